"""Measures speed and memory of training steps of stages 1, 2 and 3 against a straightforward loop.

    python tools/analysis_tools/benchmark_training.py [--quick] [--arch B] [--size 512] [--batch 8] [--dtype fp32 bf16]
        [--compile [MODE ...]] [--stages 1 2 3] [--depths 12 24]
        [--config configs/adala/stage1_dinov2l_coco.py --data-root DATA]

The images are synthetic, the weights are random, and the networks are built on the GPU if there is one. The
straightforward loop is PyTorch without optimizations: two ViTs in eager float32 (in stage 3 one ViT with its head),
linear attention by its formula, and in stage 1 hooks that record the input and output of each block's attention. All
versions take turns. With --config, it also measures the images/s of a real data loader. Writes JSON. If --out ends in
.jsonl, each row is written as soon as it is measured, and rows that the file has are skipped.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from benchmark_loader import make_loader, open_dataset
from benchmark_loader import measure as measure_loader
from benchmark_model import ARCHS, add_compile_option, compiled
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions import Attention, LinearAttention
from adala_mm.models.backbones import AdaLAViT
from adala_mm.ops import linear_attention_reference
from adala_mm.registry import MODELS
from adala_mm.utils.benchmark_tables import depth_table, training_speed_table
from adala_mm.utils.cli import find_config, one_message
from adala_mm.utils.machine import default_device, hardware
from adala_mm.utils.records import exit_if_failed, save, settings
from adala_mm.utils.row_log import open_log
from adala_mm.utils.stopwatch import failure, peak_memory, take_turns, wall_timer

PRECISION = dict(fp32={}, bf16=dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0))
SOFTMAX, LINEAR = dict(type='adala_mm.SoftmaxAttention'), dict(type='adala_mm.LinearAttention')
BASELINE = 'straightforward'
HEAD = 'mask2former_dinov2l_ade20k'
KEY = ('arch', 'size', 'batch', 'stage', 'version', 'depth')


class Training(NamedTuple):
    step: Callable[[], object]
    modules: list[nn.Module]
    optimizer: torch.optim.Optimizer

    def held_bytes(self) -> int:
        """Weights, frozen ones too, and the optimizer's state."""
        tensors = [t for module in self.modules for t in itertools.chain(module.parameters(), module.buffers())]
        tensors += [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class PlainLinearAttention(LinearAttention):
    """Linear attention as the formula says, by PyTorch's own operators."""

    attend = Attention.attend

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        return linear_attention_reference(q, k, v, self.feature_map, self.eps)


def straightforward(stage: int, vit: dict, init_cfg: dict, images: Tensor, head: str = HEAD) -> Training:
    if stage == 3:
        return segmenter(vit | dict(attention=dict(type=PlainLinearAttention), init_cfg=init_cfg), images, head)
    return two_networks(stage, vit, init_cfg, images)


def two_networks(stage: int, vit: dict, init_cfg: dict, images: Tensor) -> Training:
    """The straightforward loop of an alignment."""
    teacher = AdaLAViT(**vit, attention=SOFTMAX, init_cfg=init_cfg)
    student = AdaLAViT(**vit, attention=dict(type=PlainLinearAttention), init_cfg=init_cfg,
                       trainable=r'attn\.qkv\.' if stage == 1 else None)
    for network in (teacher, student):
        network.init_weights()
        network.to(images.device)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5)
    records: list[tuple] = []
    if stage == 1:
        for block in teacher.blocks:
            block.attn.register_forward_hook(lambda module, inputs, output: records.append((inputs, output)))

    def step() -> None:
        with torch.no_grad():
            wanted = teacher.forward_features(images)
        if stage == 1:
            loss = sum(F.mse_loss(block.attn(*inputs), output)
                       for block, (inputs, output) in zip(student.blocks, records, strict=True))
        else:
            loss = F.mse_loss(student.forward_features(images), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        records.clear()

    return Training(step, [teacher, student], optimizer)


def registered(stage: int, vit: dict, init_cfg: dict, images: Tensor, dtype: str, compile: bool | str,
               head: str = HEAD) -> Training:
    """What tools/train.py runs for a config of this stage, with --amp if it is to be bf16."""
    backbone = dict(type='adala_mm.AdaLAViT', **vit, attention=LINEAR, init_cfg=init_cfg, compile=compile)
    if stage == 3:
        return segmenter(backbone, images, head, dtype)
    kind = dict(type='adala_mm.AttentionAlignment') if stage == 1 else dict(
        type='adala_mm.FeatureAlignment', teacher=dict(backbone, attention=SOFTMAX))
    model = MODELS.build(dict(kind, backbone=backbone))
    model.init_weights()
    model.to(images.device).train()
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='AdamW', lr=1e-5)) | PRECISION[dtype])
    step = functools.partial(model.train_step, dict(inputs=images), wrapper)
    return Training(step, [model, *model.frozen.values()], wrapper.optimizer)


def segmenter(backbone: dict, images: Tensor, head: str, dtype: str = 'fp32') -> Training:
    """Stage 3: neck, head and optimizer of the config ``head`` on this backbone. Labels are squares of random classes.
    """
    from mmseg.structures import SegDataSample
    cfg = Config.fromfile(find_config(head))
    import_modules_from_strings(f'{cfg.default_scope}.models')
    size, width, last = images.shape[-1], backbone['embed_dim'], backbone['depth'] - 1
    cfg.model.backbone = dict(type='adala_mm.AdaLAViT') | backbone | dict(out_indices=[last] * 4)
    cfg.model.neck.embed_dim, cfg.model.decode_head.in_channels = width, [width] * 4
    cfg.model.data_preprocessor.size = (size, size)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    model.init_weights()
    model.to(images.device).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper | PRECISION[dtype])
    labels = torch.randint(cfg.model.decode_head.num_classes, (len(images), 1, 4, 4)).float()
    shape = dict(img_shape=(size, size), ori_shape=(size, size), pad_shape=(size, size))
    samples = [SegDataSample(metainfo=shape, gt_sem_seg=PixelData(data=label.long()))
               for label in F.interpolate(labels, (size, size))]
    step = functools.partial(model.train_step, dict(inputs=list(images), data_samples=samples), wrapper)
    return Training(step, [model], wrapper.optimizer)


def versions(args: argparse.Namespace) -> dict[str, Callable[..., Training]]:
    """By name, functions of a stage, a ViT, its weights and images. The baseline comes first."""
    return {BASELINE: functools.partial(straightforward, head=args.head)} | {
        f'ours, {dtype}{name}': functools.partial(registered, dtype=dtype, compile=compile, head=args.head)
        for name, compile in compiled(args.compile).items() for dtype in args.dtype}


def key(args: argparse.Namespace, stage: int | None) -> dict:
    """What rows of a stage have in common."""
    return dict(arch=args.arch, size=args.size, batch=args.batch, stage=stage)


def save_weights(vit: dict, folder: str, device: torch.device) -> dict:
    """``init_cfg`` of a softmax ViT with random weights."""
    path = Path(folder) / 'softmax.pth'
    with device:
        model = AdaLAViT(**vit, attention=SOFTMAX)
        model.init_weights()
    torch.save(model.state_dict(), path)
    return dict(type='Pretrained', checkpoint=str(path))


def synthetic(args: argparse.Namespace, device: torch.device) -> Tensor:
    return torch.randn(args.batch, 3, args.size, args.size, device=device)


def measure(args: argparse.Namespace, stage: int, device: torch.device) -> list[dict]:
    """One row per version."""
    vit, images = dict(ARCHS[args.arch], img_size=args.size), synthetic(args, device)
    trainings, rows = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        init_cfg = save_weights(vit, folder, device)
        for name, build in versions(args).items():
            def first_step(name=name, build=build) -> None:
                with device:  # initial weights are drawn there, which takes a CPU seconds
                    trainings[name] = build(stage, vit, init_cfg, images)
                trainings[name].step()
            rows[name] = key(args, stage) | dict(version=name)
            if note := failure(first_step, device):
                rows[name]['note'] = note
                trainings.pop(name, None)
    seconds = take_turns({name: training.step for name, training in trainings.items()}, wall_timer(device),
                         args.seconds)
    for name, training in trainings.items():
        held, step = training.held_bytes(), peak_memory(training.step, device)
        rows[name].update(ms=1000 * seconds[name], held_mib=held / 2 ** 20, mib=(held + step) / 2 ** 20)
        print(f'stage {stage}, {name}: {args.batch / seconds[name]:.2f} images/s', flush=True)
    return list(rows.values())


def measure_depths(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Memory of a step of stage 1 in ViTs of other depths."""
    rows, images = [], synthetic(args, device)
    for depth in args.depths:
        vit = dict(ARCHS[args.arch], img_size=args.size, depth=depth)
        with tempfile.TemporaryDirectory() as folder:
            init_cfg = save_weights(vit, folder, device)
            for name, build in versions(args).items():
                with device:
                    training = build(1, vit, init_cfg, images)
                training.step()  # makes the optimizer's state
                rows.append(key(args, None) | dict(
                    depth=depth, version=name, held_mib=training.held_bytes() / 2 ** 20,
                    step_mib=peak_memory(training.step, device) / 2 ** 20))
    return rows


def main() -> None:
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true',
                        help='measure a ViT-S on two images of 224 pixels for a short time')
    parser.add_argument('--arch', choices=ARCHS, help='size of the ViT (default: B; with --quick S)')
    parser.add_argument('--size', type=int, help='side of the images in pixels (default: 512; with --quick 224)')
    parser.add_argument('--batch', type=int, help='images in a batch (default: 8; with --quick 2)')
    parser.add_argument('--dtype', nargs='+', choices=['fp32', 'bf16'], default=['fp32'],
                        help='precision of ours (default: fp32); bf16 is automatic mixed precision and needs a GPU')
    add_compile_option(parser, 'also measure ours compiled,')
    parser.add_argument('--stages', nargs='+', type=int, choices=[1, 2, 3], default=[1, 2],
                        help='stages to measure (default: 1 2)')
    parser.add_argument('--head', default=HEAD, help='config for stage 3 (default: %(default)s)')
    parser.add_argument('--depths', nargs='+', type=int, default=[],
                        help='also measure the memory of stage 1 at these depths')
    parser.add_argument('--seconds', type=float, help='seconds to measure each stage (default: 10; with --quick 5)')
    parser.add_argument('--config', help='also measure the train_dataloader of this config')
    parser.add_argument('--data-root', help='use this folder where the config says data/')
    parser.add_argument('--out', default='work_dirs/benchmarks/training.json',
                        help='file to write (default: %(default)s)')
    args = parser.parse_args()
    if 'bf16' in args.dtype and device.type == 'cpu':
        parser.error('--dtype bf16: mixed precision needs a GPU')
    quick = dict(arch='S', size=224, batch=2, seconds=5.0)
    full = dict(arch='B', size=512, batch=8, seconds=10.0)
    for name, value in (quick if args.quick else full).items():
        setattr(args, name, getattr(args, name) or value)
    if args.config:  # before the long measurements, not after them
        with one_message():
            cfg, dataset = open_dataset(args.config, args.data_root)
    logging.disable(logging.INFO)  # MMEngine lists every parameter
    log = open_log(parser, args, KEY, device)
    for stage in args.stages:
        if not all(log.has(**key(args, stage), version=name) for name in versions(args)):
            for row in measure(args, stage, device):
                log.add(row)
    for row in measure_depths(args, device):
        log.add(row)
    rows = list(log.rows.values())
    data = dict(rows=[row for row in rows if row['stage']], depths=[row for row in rows if 'depth' in row],
                settings=settings(args), machine=hardware(device))
    print(training_speed_table(data))
    if args.depths:
        print(depth_table(data))
    if args.config:
        workers = cfg.train_dataloader.get('num_workers', 0)
        data['loader'] = dict(measure_loader(make_loader(cfg, dataset, workers, None), args.seconds),
                              config=Path(args.config).stem)
        print('{config}: {images_per_s:.1f} images/s from the data loader, {workers} workers'.format(**data['loader']))
    if not log.appends:
        save(args.out, data)
    exit_if_failed(row for row in data['rows'] if row['version'] != BASELINE)


if __name__ == '__main__':
    main()
