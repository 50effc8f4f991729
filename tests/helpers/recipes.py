"""Overrides that make recipes small, and runs of them."""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from safetensors.torch import save_file

from adala_mm.preflight.memory import one_thread
from adala_mm.utils.cli import base_parser, check_data, load_config
from helpers import ROOT
from helpers.pictures import NUMBER
from helpers.processes import put_back

FLAGSHIP = 'mask2former_dinov2l_ade20k'


# From here to `epochs`: overrides that make recipes small, ViTs of depth 2 and width 32, 64-pixel crops, batches of 2.
def vit(role: str) -> dict:
    shape = dict(img_size=64, embed_dim=32, depth=2, num_heads=4)
    return {f'model.{role}.{key}': value for key, value in shape.items()}


def loading(*loaders: str) -> dict:
    return {f'{loader}_dataloader.{key}': value for loader in loaders
            for key, value in dict(batch_size=2, num_workers=0, persistent_workers=False).items()}


def evaluating(**options) -> dict:
    """Options of the validation set for both loaders that read it."""
    return {f'{loader}_dataloader.{key}': value for loader in ('val', 'test')
            for key, value in {'batch_size': 1, **options}.items()}


def mask2former() -> dict:
    head = 'model.decode_head.'
    pixel, query = f'{head}pixel_decoder.', f'{head}transformer_decoder.'
    widths = [f'{pixel}encoder.layer_cfg.self_attn_cfg', f'{pixel}encoder.layer_cfg.ffn_cfg',
              f'{query}layer_cfg.self_attn_cfg', f'{query}layer_cfg.cross_attn_cfg', f'{query}layer_cfg.ffn_cfg']
    return {
        **vit('backbone'), 'model.backbone.out_indices': [1] * 4, 'model.neck.embed_dim': 32,
        f'{head}in_channels': [32] * 4, f'{head}feat_channels': 32, f'{head}out_channels': 32, f'{head}num_queries': 10,
        f'{head}positional_encoding.num_feats': 16, f'{pixel}positional_encoding.num_feats': 16,
        f'{pixel}encoder.num_layers': 1, f'{query}num_layers': 1, f'{head}train_cfg.num_points': 128,
        f'{pixel}encoder.layer_cfg.ffn_cfg.feedforward_channels': 64,
        f'{query}layer_cfg.ffn_cfg.feedforward_channels': 64,
        **{f'{width}.embed_dims': 32 for width in widths},
        'model.data_preprocessor.size': (64, 64),
        **loading('train', 'val', 'test'),
        'train_dataloader.dataset.pipeline.2.scales': [64, 96],
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
        **evaluating(**{'dataset.pipeline.1.scale': (256, 64)}),
    }


def stage1() -> dict:
    return {**vit('backbone'), **loading('train'), 'train_dataloader.dataset.pipeline.1.scale': 64}


def stage2() -> dict:
    return {**stage1(), **vit('teacher')}


def classifier_in1k() -> dict:
    return {**vit('backbone'), 'model.head.in_channels': 32, **loading('train', 'val', 'test'),
            'train_dataloader.dataset.pipeline.1.scale': 64, 'train_dataloader.dataset.indices': [0, 333, 666, 999],
            **evaluating(**{'dataset.pipeline.1.scale': 64, 'dataset.pipeline.2.crop_size': 64,
                            'dataset.indices': [5, 998]})}


def epochs(count: int) -> dict:
    return {'train_cfg.max_epochs': count, 'param_scheduler.end': count}


def arguments(options: dict) -> list[str]:
    """``options`` as words after --cfg-options."""
    return [f'{key}={value}'.replace(' ', '') for key, value in options.items()]


def runner(name: str, root: Path, options: dict, *hooks: Hook, work_dir: str | None = None,
           resume: bool = False) -> Runner:
    """What tools/train.py runs for this command line, but with ``hooks``."""
    words = [str(ROOT / f'configs/adala/{name}.py'), '--data-root', str(root), '--cfg-options', *arguments(options)]
    cfg = load_config(base_parser('').parse_args(words + (['--work-dir', work_dir] if work_dir else [])))
    cfg.resume = resume
    # Runs of one process within one second would share log files.
    cfg.experiment_name = cfg.visualizer.name = f'{name}_{next(NUMBER)}'
    check_data(cfg, ('train_dataloader', 'val_dataloader'))
    run = Runner.from_cfg(cfg)
    for hook in hooks:
        run.register_hook(hook)
    return run


class Recorder(Hook):
    """What the model was when its first training step began, where that was, and all learning rates and losses."""

    def __init__(self) -> None:
        self.rates, self.losses = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if not self.rates:
            self.start = runner.iter
            self.state = {key: value.clone() for key, value in runner.model.state_dict().items()}
            self.optimizer = copy.deepcopy(runner.optim_wrapper.state_dict())
        self.rates.append(runner.optim_wrapper.param_groups[0]['lr'])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())


def assert_equal(got, wanted) -> None:
    """Bitwise, through nested dicts and lists."""
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(got, wanted)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_equal(got[key], value)
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted)
        for pair in zip(got, wanted, strict=True):
            assert_equal(*pair)
    else:
        assert got == wanted


@contextlib.contextmanager
def apart(folder: Path) -> Iterator[None]:
    """In ``folder``; what runs leave in the process (scope, loggers, loading scheme) is put back afterwards."""
    with pytest.MonkeyPatch.context() as patch, one_thread():
        put_back(patch)
        patch.chdir(folder)
        yield


def pretrained_file(path: Path, timm_name: str = 'vit_large_patch14_dinov2.lvd142m') -> Path:
    """A model of timm's with the recipe's keys, but narrow, at its own patch size and on a 3 x 3 grid."""
    patch = 16 if 'patch16' in timm_name else 14
    model = timm.create_model(timm_name, img_size=3 * patch, embed_dim=32, depth=2, num_heads=4, num_classes=0)
    generator = torch.Generator().manual_seed(3)
    state = {key: 0.2 * torch.randn(value.shape, generator=generator) + ('norm' in key and key.endswith('weight'))
             for key, value in model.state_dict().items()}
    save_file(state, path)
    return path
