"""Tables of rotary positions."""
from __future__ import annotations

import math

import pytest
import torch

from adala_mm.ops import RotaryPositions, turn
from adala_mm.registry import ATTENTIONS
from helpers.rotary import narrow, own

ATTENTIONS.import_from_location()


# --- tables ----------------------------------------------------------------------------------------------------------


def test_coordinates_are_disturbed_in_training_as_in_timm():
    disturbances = dict(shift=0.1, jitter=1.5, rescale=2.0)
    theirs = narrow(**{f'rope_{name}_coords': value for name, value in disturbances.items()}).rope
    ours = own(rotary=disturbances)
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        assert 'rotary' not in str(ours.state_dict().keys())
        torch.manual_seed(3)
        sin, cos = theirs.get_embed((3, 5)).chunk(2, dim=-1)
        torch.manual_seed(3)
        *_, found = ours.layout(torch.zeros(1), (3, 5))
        torch.testing.assert_close((found.cos, found.sin), (cos[:, :4], sin[:, :4]), rtol=1e-6, atol=1e-6)
        still = RotaryPositions(8)((3, 5))
        assert torch.equal(found.cos, still.cos) != training
    *_, found = own().train().layout(torch.zeros(1), (3, 5))  # nothing unless asked for
    assert torch.equal(found.cos, still.cos)


def test_tables_stay_in_float32():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        *_, rotation = own().to(dtype).layout(torch.zeros(1, dtype=dtype), (4, 4))
        assert rotation.cos.dtype == rotation.sin.dtype == torch.float32
    x = torch.randn(1, 2, 16, 8, dtype=torch.bfloat16)
    assert turn(x, rotation).dtype == torch.bfloat16
    torch.testing.assert_close(turn(x, rotation), turn(x.float(), rotation).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(('options', 'message'), [
    (dict(base=0.0), 'base=0.0 .* above 0'), (dict(shift=-0.1), 'shift=-0.1 .* at least 0'),
    (dict(jitter=0.5), 'jitter=0.5 .* at least 1'), (dict(rescale=math.inf), 'rescale=inf .* finite')])
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        own(rotary=options)


def test_channels_that_four_does_not_divide():
    with pytest.raises(ValueError, match='6 channels in a head.*multiple of 4'):
        own(embed_dim=24)
