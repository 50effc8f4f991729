"""Models to export, and how an exported file is compared."""
from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from adala_mm import export
from adala_mm.export.parity import shapes
from helpers import LINEAR, ROOT, tiny_vit

SOFTMAX = dict(type='adala_mm.SoftmaxAttention')
SEGMENTOR = dict(
    type='EncoderDecoder', decode_head=dict(
        type='FCNHead', in_channels=32, channels=32, num_convs=0, concat_input=False, num_classes=4, dropout_ratio=0.0,
        align_corners=False, loss_decode=dict(type='CrossEntropyLoss')), test_cfg=dict(mode='whole'))


def config(backbone: dict, scope: str = 'mmseg', **model) -> Config:
    return Config(dict(default_scope=scope, model=dict(model or dict(type='adala_mm.FeatureAlignment'),
                                                       backbone=backbone)))


def awake(target: export.Target) -> export.Target:
    """With weights that make every part of the model visible."""
    for name, parameter in target.model.named_parameters():
        nn.init.normal_(parameter, mean=float('norm' in name and 'weight' in name), std=0.3)
    return target


def make(backbone: dict, part: str = 'backbone', scope: str = 'mmseg', **model) -> export.Target:
    return awake(export.assemble(config(backbone, scope, **model), part))


def write_segmentor(folder: Path) -> tuple[Path, Path]:
    """Config and checkpoint of a tiny linear segmentor."""
    cfg = config(tiny_vit(attention=LINEAR), **SEGMENTOR)
    cfg.dump(folder / 'config.py')
    torch.save(dict(state_dict=awake(export.assemble(cfg, 'model')).model.state_dict()), folder / 'weights.pth')
    return folder / 'config.py', folder / 'weights.pth'


def compared(target: export.Target, run, dynamic: bool = True, tolerance: float = 1e-4) -> list[export.Difference]:
    found = export.differences(target.module, run, shapes(target.size, target.multiple, dynamic))
    export.check(found, tolerance)
    return found


def tool(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, args)])
    runpy.run_path(str(ROOT / 'tools/export.py'), run_name='__main__')


CLASSIFIER = dict(type='ImageClassifier', head=dict(type='LinearClsHead', num_classes=5, in_channels=32))
