"""What the analysis tools are tried on."""
from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from adala_mm.datasets.beacons import draw_scene
from helpers import LINEAR, tiny_vit
from helpers.analysis import COUNT, NORM, TOOLS


@pytest.fixture(scope='session')
def world(tmp_path_factory, sharp_pretrained) -> dict[str, Path]:
    """Drawn images, a student's checkpoint, and configs of all stages around a tiny softmax teacher."""
    root = tmp_path_factory.mktemp('analysis')
    (root / 'images').mkdir()
    for i in range(COUNT):
        Image.fromarray(draw_scene(np.random.default_rng(i), 48)[0]).save(root / f'images/{i:02d}.png')
    teacher = tiny_vit(init_cfg=sharp_pretrained)
    student = tiny_vit(attention=LINEAR, init_cfg=sharp_pretrained)
    state = torch.load(sharp_pretrained['checkpoint'])
    generator = torch.Generator().manual_seed(5)
    near = {f'backbone.{key}': value + 0.02 * torch.randn(value.shape, generator=generator)
            for key, value in state.items()}
    torch.save(dict(state_dict=near), root / 'near.pth')
    val = dict(batch_size=2, num_workers=0, dataset=dict(
        type='adala_mm.ImageFiles', data_root=str(root), data_prefix='images', pipeline=[]))

    def config(name: str, scope: str = 'mmpretrain', **model) -> None:
        Config(dict(default_scope=scope, val_dataloader=val, model=model)).dump(root / f'{name}.py')

    config('stage1', type='adala_mm.AttentionAlignment', backbone=student, data_preprocessor=NORM)
    config('stage2', type='adala_mm.FeatureAlignment', backbone=student, teacher=teacher, data_preprocessor=NORM)
    head = dict(type='FCNHead', in_channels=32, channels=32, num_convs=0, concat_input=False, num_classes=4,
                dropout_ratio=0.0, align_corners=False, loss_decode=dict(type='CrossEntropyLoss'))
    seg = dict(type='SegDataPreProcessor', size=(32, 32), test_cfg=dict(size_divisor=8),
               **{key: NORM[key] for key in ('mean', 'std', 'bgr_to_rgb')})
    config('stage3', 'mmseg', type='EncoderDecoder', backbone=student, decode_head=head, data_preprocessor=seg,
           test_cfg=dict(mode='whole'))
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in state.items()}
                    | {'decode_head.conv_seg.bias': torch.zeros(4)}), root / 'tuned.pth')
    config('task', 'mmseg', type='adala_mm.TaskModelAlignment', task_model='EncoderDecoder', backbone=student,
           teacher=dict(type='Pretrained', checkpoint=str(root / 'tuned.pth')), decode_head=head,
           data_preprocessor=seg)
    config('softmax', 'mmseg', type='EncoderDecoder', backbone=teacher, decode_head=head, data_preprocessor=seg)
    config('foreign', type='EncoderDecoder', backbone=dict(type='ResNet', depth=18), decode_head=head)
    config('deeper', type='adala_mm.FeatureAlignment', backbone=student | dict(depth=3), teacher=teacher)
    return {path.stem: path for path in [*root.glob('*.py'), root / 'near.pth', root / 'images']}


@pytest.fixture
def tool(monkeypatch, capsys):
    def call(name: str, *words: str | Path) -> str:
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, words)])
        runpy.run_path(str(TOOLS / f'{name}.py'), run_name='__main__')
        return capsys.readouterr().out
    return call
