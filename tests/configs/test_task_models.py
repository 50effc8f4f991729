"""The configs of TaskModelAlignment: the plain recipe, with its checkpoint as the teacher."""
from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from adala_mm.registry import MODELS
from helpers import ROOT

CONFIGS = sorted(ROOT.glob('configs/*/task_*.py'))


def last_checkpoint(name: str) -> str:
    """What a finished run of the config leaves in its default work dir."""
    loop = Config.fromfile(next(ROOT.glob(f'configs/*/{name}.py'))).train_cfg
    by_epoch = loop.type == 'EpochBasedTrainLoop'
    return f'work_dirs/{name}/' + (f'epoch_{loop.max_epochs}.pth' if by_epoch else f'iter_{loop.max_iters}.pth')


def test_there_are_configs_for_both_heads():
    assert {path.stem.split('_')[1] for path in CONFIGS} == {'mask2former', 'cls', 'probe'} and len(CONFIGS) >= 6


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configs(path):
    """Name, chain of checkpoints, weights of the plain model, and what learns at which rate."""
    head, vfm, *change, dataset = path.stem.removeprefix('task_').split('_')
    keepattn = change == ['keepattn']
    assert keepattn or not change
    assert path.read_text().startswith('# ') and len(path.read_text().splitlines()) <= 40
    cfg, base = Config.fromfile(path), f'{head}_{vfm}_{dataset}'
    stage3 = Config.fromfile(next(ROOT.glob(f'configs/*/{base}.py')))
    model = cfg.model
    assert model.teacher.checkpoint == last_checkpoint(f'{head}_{vfm}_softmax_{dataset}')
    # A head on frozen features: the teacher's attentions are those of the pretrained ViT, which have a stage 1 already.
    frozen = stage3.model.backbone.get('trainable') is not None
    stage1 = 'stage1_deitt_caltech' if frozen else f'stage1_{vfm}_task_{dataset}'
    assert model.backbone.init_cfg.checkpoint == (
        stage3.model.backbone.init_cfg.checkpoint if keepattn else last_checkpoint(stage1))
    assert model.task_model == stage3.model.type
    for key in ('train_dataloader', 'val_dataloader', 'val_evaluator', 'default_scope', 'default_hooks'):
        assert cfg[key] == stage3[key], key
    assert cfg.train_cfg == stage3.train_cfg
    if keepattn:
        assert cfg.optim_wrapper == stage3.optim_wrapper and cfg.param_scheduler == stage3.param_scheduler
        assert (model.task_weight, model.attention_weight, model.features) == (1.0, 50.0, {})
    else:
        assert cfg.optim_wrapper.optimizer.lr == 1e-3 and 'paramwise_cfg' not in cfg.optim_wrapper  # as stage 2
    for some in (model, stage3.model):
        some.backbone.update(depth=2, out_indices=[-1] * (4 if head == 'mask2former' else 1))
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        ours, theirs = MODELS.build(model), MODELS.build(stage3.model)
        ours.train()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {name.split('.')[0] for name, p in ours.named_parameters() if p.requires_grad} == (
        {name.split('.')[0] for name, _ in theirs.named_parameters()} if keepattn else {'backbone'})
