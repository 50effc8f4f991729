"""Training at growing resolutions."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from adala_mm.engine import ProgressiveResolutionHook
from helpers import tiny_vit


def test_progressive_resolution(pretrained):
    model = MMENGINE_MODELS.build(dict(type='adala_mm.AttentionAlignment', backbone=tiny_vit(
        attention=dict(type='adala_mm.LinearAttention'), init_cfg=pretrained)))
    hook, seen = ProgressiveResolutionHook({4: 64, 0: 32, 2: 48}), []
    model.teacher_ready, model.loss = True, lambda images: seen.append(tuple(images.shape[2:]))
    for epoch in range(6):  # a resumed run begins anywhere
        hook.before_train_epoch(SimpleNamespace(epoch=epoch, model=model))
        model(torch.randn(1, 3, 64, 64), mode='loss')
    assert seen == [(32, 32), (32, 32), (48, 48), (48, 48), (64, 64), (64, 64)]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 65, 32)  # validation keeps its size


def test_progressive_resolution_rejects_what_does_not_fit(segmentor):
    with pytest.raises(ValueError, match='nothing about epoch 0'):
        ProgressiveResolutionHook({1: 64})
    with pytest.raises(ValueError, match='not for EncoderDecoder'):
        ProgressiveResolutionHook({0: 64}).before_train_epoch(SimpleNamespace(epoch=0, model=segmentor))
    model = MMENGINE_MODELS.build(dict(type='adala_mm.FeatureAlignment', backbone=tiny_vit(), teacher=tiny_vit()))
    with pytest.raises(ValueError, match='60 is no multiple of the patch size 8'):
        ProgressiveResolutionHook({0: 60}).before_train_epoch(SimpleNamespace(epoch=0, model=model))
    iterations, epochs = (SimpleNamespace(train_loop=object.__new__(kind))
                          for kind in (IterBasedTrainLoop, EpochBasedTrainLoop))
    with pytest.raises(ValueError, match='IterBasedTrainLoop counts none: use train_cfg'):
        ProgressiveResolutionHook({0: 64}).before_train(iterations)
    ProgressiveResolutionHook({0: 64}).before_train(epochs)
