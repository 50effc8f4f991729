"""Every config starts where its predecessor ended, and sees images as its pretrained model did."""
from __future__ import annotations

import functools
import re
import runpy

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmseg.structures import SegDataSample

from adala_mm.models.backbones.weights import plain_names
from helpers import ROOT
from helpers.configs import (
    FOLDERS,
    FULL_SIZE,
    NAMES,
    PREVIOUS,
    checkpoints,
    config,
    every_config,
    parsed,
    parts,
    scope_of,
)

# The one checkpoint that is neither a stage's nor timm's by name; its config says which timm model it is.
DEIT = 'data/weights/deit_tiny_patch16_224.safetensors'


@functools.cache
def demo_runs() -> dict:
    """Runs of tools/demo.py by name."""
    return {run.name: run for run in runpy.run_path(str(ROOT / 'tools/demo.py'))['RUNS']}


def last_checkpoint(name: str) -> str:
    """File that a finished run of the config leaves in its default work dir."""
    loop = parsed(name).train_cfg
    if loop.type == 'EpochBasedTrainLoop':
        return f'work_dirs/{name}/epoch_{loop.max_epochs}.pth'
    return f'work_dirs/{name}/iter_{loop.max_iters}.pth'


@every_config
def test_checkpoint_of_the_last_step_is_saved(name):
    cfg = config(name)
    hook = cfg.default_hooks.checkpoint
    by_epoch = cfg.train_cfg.type == 'EpochBasedTrainLoop'
    length = cfg.train_cfg.max_epochs if by_epoch else cfg.train_cfg.max_iters
    assert hook.get('by_epoch', True) == by_epoch == cfg.log_processor.by_epoch
    assert length % hook.interval == 0
    for scheduler in [cfg.param_scheduler] if isinstance(cfg.get('param_scheduler'), dict) else \
            cfg.get('param_scheduler') or []:
        assert scheduler.by_epoch == by_epoch and scheduler.end <= length
        assert scheduler.type != 'PolyLR' or scheduler.end == length


def previous(name: str) -> set[str]:
    facts = parts(name)
    vfm, attention = facts['vfm'], facts['attention']
    if name in PREVIOUS:
        return PREVIOUS[name]
    if facts['stage'] in ('stage1', 'scratch') or attention == 'softmax':
        return set()
    if '_scratch' in facts['changes']:
        return {f'scratch_{vfm}_in1k'}
    if '_native' in facts['changes']:  # only these two are aligned before they learn the task
        return {f'stage1_{vfm}_{attention}_native_coco'} if attention in ('hedgehog', 'lolcats') else set()
    model = f'{vfm}_{attention}' if attention else vfm
    if '_fast' in facts['changes']:
        model += '_fast'
    return {f'stage1_{model}_coco' if facts['stage'] == 'stage2' else f'stage2_{model}_in22k'}


@every_config
def test_starts_from_what_the_previous_stage_writes(name):
    cfg = config(name)
    named = set(checkpoints(cfg.model.to_dict()))
    stages = {path for path in named if path.startswith('work_dirs/')}
    assert previous(name) <= set(NAMES)
    if FOLDERS[name] == 'demo':
        runs = {run.config: run for run in demo_runs().values()}
        wanted = {last_checkpoint(stage).replace(f'work_dirs/{stage}/', f'work_dirs/demo/{runs[stage].name}/')
                  for stage in previous(name)}
        # tools/demo.py waits for the run that a run starts from; what that one needed is there as well.
        reachable, todo = set(), list(runs[name].needs)
        while todo:
            reachable.add(todo.pop())
            todo += [need for run in reachable for need in demo_runs()[run].needs if need not in reachable]
        assert {demo_runs()[run].config for run in reachable} >= previous(name)
    else:
        wanted = {last_checkpoint(stage) for stage in previous(name)}
    assert stages == wanted
    vfm = cfg.get('pretrained', {}).get('checkpoint')
    assert named - stages <= {vfm} and (vfm is None or vfm.startswith('timm://') or vfm == DEIT)
    assert named or parts(name)['stage'] in ('teacher', 'scratch')
    # Strict loading needs the same ViT on both sides. In the demo, runs start from the softmax teacher as well.
    free = ['init_cfg', 'img_size', 'out_indices', 'out_type', 'trainable', 'drop_path_rate', 'with_cp']
    free += ['attention'] * (FOLDERS[name] == 'demo' or '_task_' in name)
    free += ['type', 'num_queries', 'query_blocks'] * name.startswith('eomt')
    for stage in previous(name):
        ours, theirs = cfg.model.backbone.to_dict(), config(stage).model.backbone.to_dict()
        for key in free:
            ours.pop(key, None), theirs.pop(key, None)
        assert ours == theirs


@pytest.mark.parametrize('name', [name for name in NAMES if name.startswith(('calibrate_', 'stage2_'))])
def test_stage_2_has_the_teacher_of_stage_1(name):
    cfg = config(name)
    teacher, student = cfg.model.teacher.to_dict(), cfg.model.backbone.to_dict()
    assert teacher.pop('attention') == dict(type='adala_mm.SoftmaxAttention')
    stage1 = config(re.sub(r'^(?:calibrate|stage2)_(\w+?)'
                           r'(_nostage1|_qkv|_fsdp|_earlystop|_cosine|_masked|_multilayer|_keepattn)?_(in22k|coco|caltech|beacons)$',
                           lambda m: f'stage1_{m[1]}_{m[3].replace("in22k", "coco")}', name))
    assert teacher.pop('init_cfg') == stage1.model.backbone.init_cfg.to_dict()
    for key in ('attention', 'init_cfg', 'trainable', 'with_cp'):  # what the student has of its own
        student.pop(key, None)
    assert teacher == student
    assert cfg.model.data_preprocessor == stage1.model.data_preprocessor


def normalisation(cfg: Config) -> tuple[list[float], list[float]]:
    """Mean and std, in RGB from 0 to 255, that the pretrained model was trained with."""
    if cfg.get('pretrained') is None:  # the demo's own
        return [110.0] * 3, [55.0] * 3
    checkpoint = cfg.pretrained.checkpoint
    name = 'deit_tiny_patch16_224.fb_in1k' if checkpoint == DEIT else checkpoint.removeprefix('timm://')
    facts = timm.get_pretrained_cfg(name)
    assert facts is not None, name
    return [255 * m for m in facts.mean], [255 * s for s in facts.std]


@every_config
def test_images_are_normalised_as_in_pretraining(name):
    cfg = config(name)
    mean, std = normalisation(cfg)
    assert cfg.model.data_preprocessor.mean == pytest.approx(mean, abs=1e-3)
    assert cfg.model.data_preprocessor.std == pytest.approx(std, abs=1e-3)
    # And in RGB, while files are read as BGR: 1, 2 and 3 deviations above the mean of R, G and B come out as such.
    with scope_of(cfg):
        preprocessor = MODELS.build(dict(cfg.model.data_preprocessor))
    colour = torch.tensor([m + i * s for i, m, s in zip((1, 2, 3), mean, std, strict=True)]).flip(0)
    data = dict(inputs=[colour[:, None, None].expand(3, 96, 96)])
    if cfg.model.type == 'EncoderDecoder':  # pads, and wants to note it down
        data.update(data_samples=[SegDataSample()])
    out = preprocessor(data)['inputs']
    torch.testing.assert_close(out, torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1).expand_as(out), atol=1e-3, rtol=0)


@pytest.mark.parametrize('name', FULL_SIZE)
def test_patch_16(name):
    cfg = config(name)
    vits = [cfg.model.backbone] + ([cfg.model.teacher] if 'teacher' in cfg.model else [])
    assert [vit.patch_size for vit in vits] == [16] * len(vits)


@pytest.mark.parametrize('name', [name for name in NAMES if name.startswith('stage1_') and 'demo' not in name
                                  and not parts(name)['attention'] and '_dwconv_' not in name])
def test_backbone_is_the_pretrained_model(name):
    cfg = config(name)
    checkpoint = cfg.pretrained.checkpoint
    with torch.device('meta'):
        ours = MODELS.build(dict(cfg.model.backbone, type='adala_mm.AdaLAViT'))
        theirs = timm.create_model('deit_tiny_patch16_224' if checkpoint == DEIT else
                                   checkpoint.removeprefix('timm://'))
    ours_state, theirs_state = ours.state_dict(), plain_names(theirs.state_dict())
    heads = re.compile(r'(head|fc_norm|attn_pool)\.')
    assert set(ours_state) == {key for key in theirs_state if not heads.match(key)}
    resized = {'pos_embed', 'patch_embed.proj.weight'}
    assert all(ours_state[key].shape == theirs_state[key].shape for key in set(ours_state) - resized)
    block, twin = ours.blocks[0], theirs.blocks[0]
    assert block.attn.num_heads == twin.attn.num_heads
    x = torch.linspace(-4, 4, 50)
    if 'siglip2b' not in name:  # which timm runs with exact GELU, and the base file as it was trained
        torch.testing.assert_close(block.mlp.act(x), twin.mlp.act(x))
    assert block.norm1.eps == twin.norm1.eps == ours.norm.eps
    assert ours.num_prefix == theirs.num_prefix_tokens
