"""A small segmentor of mmseg, and how models of other libraries are built."""
from __future__ import annotations

import copy

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import DefaultScope

from helpers import tiny_vit

CLASSES = 5
SEGMENTOR = {
    'type': 'mmseg.EncoderDecoder', 'backbone': tiny_vit(), 'train_cfg': {}, 'test_cfg': {'mode': 'whole'},
    'decode_head': {'type': 'mmseg.FCNHead', 'in_channels': 32, 'channels': 32, 'num_convs': 0, 'concat_input': False,
                    'num_classes': CLASSES, 'loss_decode': {'type': 'mmseg.CrossEntropyLoss', 'avg_non_ignore': True}}}


def build(config: dict):
    with DefaultScope.overwrite_default_scope(config['type'].split('.')[0]):
        return MMENGINE_MODELS.build(copy.deepcopy(config))
