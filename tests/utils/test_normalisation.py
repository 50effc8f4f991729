"""Weights that say by which mean and std their images were normalised, and a config with others: a warning."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from safetensors.torch import save_file

from adala_mm.conversion import convert, metadata, write
from adala_mm.engine import WeightsCheckHook
from adala_mm.preflight import Plan
from adala_mm.preflight.checkpoints import normalisation
from adala_mm.registry import MODELS
from adala_mm.utils.normalisation import other_normalisation
from helpers import ROOT, tiny_vit

CLIP = dict(mean=[122.7709383, 116.7460125, 104.09373615], std=[68.5005327, 66.6321579, 70.32316305])
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
GREY = dict(mean=[114.495], std=[57.63])  # the means of ImageNet's


class Net(BaseModel):
    def __init__(self, backbone: dict, data_preprocessor: dict) -> None:
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.backbone(inputs)


@pytest.fixture
def converted(tmp_path) -> str:
    """A file of tools/convert_vfm.py."""
    done = convert(MODELS.build(tiny_vit()).state_dict(), 'deit', num_heads=4)
    write(done, tmp_path / 'a.safetensors', metadata(done, 'tiny', ''))
    return str(tmp_path / 'a.safetensors')


def test_other_channels_are_not_those_of_the_weights(converted):
    assert other_normalisation(converted, [*IMAGENET['mean'], 90.0], [*CLIP['std'], 50.0]) is None


def test_files_of_others_are_not_read_as_ours(tmp_path):
    """Their metadata may have such names, and any text."""
    save_file({'cls_token': torch.zeros(1)}, tmp_path / 'a.safetensors', dict(mean='0.485,0.456,0.406', std='0.2'))
    assert other_normalisation(str(tmp_path / 'a.safetensors'), **IMAGENET) is None


@pytest.mark.parametrize(('used', 'warned'), [(CLIP, True), (IMAGENET, False), (GREY, False), ({}, False)],
                         ids=['other', 'same', 'one value', 'none'])
def test_training_and_check_warn(converted, used, warned):
    backbone = tiny_vit(init_cfg=dict(type='Pretrained', checkpoint=converted))
    preprocessor = dict(type='ImgDataPreprocessor', **used)
    model, said = Net(backbone, preprocessor), []
    model.init_weights()
    WeightsCheckHook().before_train(SimpleNamespace(
        model=model, _resume=False, _load_from=None, logger=SimpleNamespace(warning=said.append, info=str)))
    plan = Plan(Config(dict(model=dict(data_preprocessor=preprocessor))))
    with torch.device('meta'):
        plan._made[('model',)] = Net(backbone, preprocessor)
    findings = list(normalisation(plan))
    if warned:
        for text in (said[0], f'{findings[0].found}: {findings[0].fix}'):
            assert f'mean=[122.771,116.746,104.094] std=[68.5005,66.6322,70.3232], and {converted}' in text
            assert text.endswith('--cfg-options model.data_preprocessor.mean=[123.675,116.28,103.53] '
                                 'model.data_preprocessor.std=[58.395,57.12,57.375]')
    assert len(said) == warned and [finding.status for finding in findings] == (
        ['warning'] if warned else ['ok'] if used else [])


def test_timm_states_it_of_a_name():
    name = 'timm://vit_base_patch16_clip_224.openai'
    assert other_normalisation(name, **CLIP) is None and other_normalisation(name, **IMAGENET) is not None
    assert other_normalisation('timm://no_such_model', **IMAGENET) is None
    assert other_normalisation('https://example.org/model.pth', **IMAGENET) is None


def test_our_configs_normalise_as_timm_does():
    looked = 0
    for path in sorted((ROOT / 'configs/_base_/backbones').glob('*.py')):
        cfg = Config.fromfile(path)
        checkpoint = ((cfg.get('backbone') or {}).get('init_cfg') or {}).get('checkpoint', '')
        if checkpoint.startswith('timm://') and timm.models.get_pretrained_cfg(checkpoint[len('timm://'):]):
            assert other_normalisation(checkpoint, cfg.preprocessor['mean'], cfg.preprocessor['std']) is None, path
            looked += 1
    assert looked >= 3
