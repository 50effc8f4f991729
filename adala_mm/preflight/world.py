"""Processes and devices of the run."""
from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import nn

from adala_mm.preflight.plan import TRAIN, VAL, Plan
from adala_mm.preflight.report import ERROR, OK, WARNING, Finding


def world(plan: Plan) -> Iterator[Finding]:
    """There are GPUs, images and statistics for every process."""
    findings = [*devices(plan), *shares(plan), *batch_norm(plan)]
    yield from findings
    if not findings:
        yield Finding('processes', OK, f'{plan.processes}, {torch.cuda.device_count()} GPUs visible here')


def devices(plan: Plan) -> Iterator[Finding]:
    """GPUs for all processes of this machine, and what runs on GPUs only."""
    visible, asked = torch.cuda.device_count(), int(os.environ.get('LOCAL_WORLD_SIZE', plan.processes))
    if visible and asked > visible and not plan.device_memory:
        yield Finding('processes', ERROR, f'{asked} processes, but {visible} GPUs are visible',
                      f'--gpus {visible}, or check CUDA_VISIBLE_DEVICES; on several machines, set LOCAL_WORLD_SIZE to '
                      'the processes of each')
    if visible or plan.device_memory:  # planned for another machine
        return
    yield Finding('processes', WARNING, 'no GPU is visible: the run would be on the CPU',
                  'on the machine that plans a run elsewhere, say --device-memory GB')
    if plan.cfg.optim_wrapper.get('type') == 'AmpOptimWrapper':
        yield Finding('processes', ERROR, 'automatic mixed precision needs a GPU',
                      'leave --amp out, or --cfg-options optim_wrapper.type=OptimWrapper')


def shares(plan: Plan) -> Iterator[Finding]:
    """Every process gets images of its own."""
    for loader in plan.loaders:
        try:
            images = len(plan.dataset(loader))
        except Exception:  # told by the checks of the data
            continue
        batch, drop = plan.cfg[loader].batch_size, plan.cfg[loader].get('drop_last')
        if loader == VAL and images < plan.processes:
            yield Finding('processes', WARNING, f'{images} validation images for {plan.processes} processes: some '
                          'repeat what others do', 'validate on more images, or train with fewer processes')
        endless = str(plan.cfg[loader].get('sampler', {}).get('type')).endswith('InfiniteSampler')
        share = -(-images // plan.processes)
        if loader == TRAIN and share < batch and not endless:
            yield Finding('processes', ERROR if drop else WARNING, f'{share} training images for each of '
                          f'{plan.processes} processes, fewer than batch_size={batch}'
                          + (', and drop_last drops them all' if drop else ''),
                          f'--cfg-options {TRAIN}.batch_size={share}, or fewer processes')


def batch_norm(plan: Plan) -> Iterator[Finding]:
    """BatchNorm is synchronised over processes that have few images each, and only where that works."""
    modules = list(plan.model.modules())
    if any(isinstance(m, nn.SyncBatchNorm) for m in modules) and not torch.cuda.is_available() \
            and not plan.device_memory:
        yield Finding('processes', ERROR, 'SyncBN needs a GPU', "set norm_cfg=dict(type='BN')")
    own = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)
           and not isinstance(m, nn.SyncBatchNorm) and m.weight is not None and m.weight.requires_grad]
    batch = plan.cfg[TRAIN].batch_size
    if own and plan.processes > 1 and batch < 16 and not plan.cfg.get('sync_bn'):
        yield Finding('processes', WARNING, f'{len(own)} BatchNorm layers see {batch} images each',
                      '--cfg-options sync_bn=torch')
