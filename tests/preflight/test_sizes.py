"""Sizes of images, crops, windows and padding that the patch does not divide."""
from __future__ import annotations

from pathlib import Path

import pytest

from adala_mm.preflight.sizes import cropped_size
from helpers.preflight import BATCHES, STAGE1, assert_one_red, check, flagship, red
from helpers.recipes import pretrained_file, stage1


def test_crop_that_the_patch_does_not_divide(root):
    wrong = red(check(STAGE1, '--data-root', root, options=stage1() | {
        'model.backbone.init_cfg.checkpoint': pretrained_file(Path('model.safetensors')),
        'train_dataloader.dataset.pipeline.1.scale': 60}))
    found = {finding['name']: finding for finding in wrong}
    assert 'train_dataloader pipeline 60 x 60' in found['image sizes']['found']
    assert 'multiples of 16' in found['image sizes']['fix']
    assert 'does not divide 60 x 60' in found['train_dataloader batch']['found']


def test_image_size_that_the_patch_does_not_divide(root):
    wrong = red(flagship(root, **BATCHES, **{'model.backbone.img_size': 60}))
    assert wrong[0]['name'] == 'model' and 'patches of 16' in wrong[0]['found']


def test_padding_that_the_patch_does_not_divide(root):
    wrong = red(flagship(root, **BATCHES, **{'model.data_preprocessor.test_cfg.size_divisor': 24}))
    assert 'size_divisor=24' in next(f['found'] for f in wrong if f['name'] == 'image sizes')


def test_sliding_window(root):
    slide = BATCHES | {'model.test_cfg.mode': 'slide', 'model.test_cfg.stride': (32, 32)}
    assert red(flagship(root, **slide, **{'model.test_cfg.crop_size': (64, 64)})) == []
    assert_one_red(flagship(root, **slide, **{'model.test_cfg.crop_size': (64, 60)}), 'image sizes',
                   'does not divide test_cfg.crop_size 64 x 60', fix='multiples of 16')
    mmsegs = {'model.test_cfg.crop_size': (64, 64), 'model.decode_head.type': 'Mask2FormerHead'}
    assert_one_red(flagship(root, **slide, **mmsegs), 'image sizes', "mmseg's Mask2FormerHead",
                   fix='model.decode_head.type=adala_mm.Mask2FormerHead')
    assert red(flagship(root, **BATCHES, **{'model.decode_head.type': 'Mask2FormerHead'})) == []


@pytest.mark.parametrize(('steps', 'size'), [
    ([dict(type='LoadImageFromFile'), dict(type='RandomCrop', crop_size=(64, 96)), dict(type='PackSegInputs')],
     (64, 96)),
    ([dict(type='mmpretrain.RandomResizedCrop', scale=64), dict(type='mmpretrain.ColorJitter')], (64, 64)),
    ([dict(type='CenterCrop', crop_size=64), dict(type='Resize', scale=(2048, 512), keep_ratio=True)], None),
    ([dict(type='Resize', scale=(96, 64))], (64, 96)),
    ([dict(type='LoadImageFromFile'), dict(type='PackSegInputs')], None),
])
def test_size_that_a_pipeline_gives(steps, size):
    assert cropped_size(steps) == size
