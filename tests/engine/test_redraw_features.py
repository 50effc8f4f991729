"""Random features are redrawn."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS

from adala_mm.engine import RedrawFeaturesHook
from helpers import tiny_vit


@pytest.mark.parametrize(('iteration', 'interval', 'redrawn'), [(0, 5, False), (4, 5, False), (5, 5, True),
                                                                (10, 5, True), (5, None, False)])
def test_random_features_are_redrawn_after_their_interval(iteration, interval, redrawn):
    vits = [MMENGINE_MODELS.build(tiny_vit(attention=dict(type='adala_mm.PerformerAttention',
                                                          redraw_interval=interval))) for _ in range(2)]
    vits[1].load_state_dict(vits[0].state_dict())
    before = [block.attn.feature_map.projection.clone() for block in vits[0].blocks]
    for process, vit in enumerate(vits):
        torch.manual_seed(process)  # processes are at different places in their own random sequences
        RedrawFeaturesHook().before_train_iter(SimpleNamespace(iter=iteration, seed=3, model=vit), 0)
    after = [[block.attn.feature_map.projection for block in vit.blocks] for vit in vits]
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))
    assert all(torch.equal(a, b) != redrawn for a, b in zip(after[0], before, strict=True))
    assert not torch.equal(*after[0])  # layers do not share their features
