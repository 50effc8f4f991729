"""The simple feature pyramid against its definition."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adala_mm.models.necks import SimpleFeaturePyramid


def channel_norm(x, norm):
    mean, var = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def doubled(x, deconv):
    """A transposed convolution of kernel and stride 2, pixel by pixel."""
    out = torch.einsum('bchw,cdij->bdhiwj', x, deconv.weight)
    return out.flatten(4, 5).flatten(2, 3) + deconv.bias[:, None, None]


def test_pyramid_by_definition():
    neck = SimpleFeaturePyramid(8, 5).double()
    for parameter in neck.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    four, two, one, half = neck.stages
    wanted = []
    for stage, y in [
            (four[4:], doubled(F.gelu(channel_norm(doubled(x, four[0]), four[1])), four[3])),
            (two[1:], doubled(x, two[0])), (one, x), (half[1:], x.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5)))]:
        reduce, norm1, conv, norm2 = stage
        y = channel_norm(torch.einsum('bchw,dcij->bdhw', y, reduce.weight), norm1)
        wanted.append(channel_norm(F.conv2d(F.pad(y, (1, 1, 1, 1)), conv.weight), norm2))
    wanted.append(wanted[-1][:, :, ::2, ::2])
    found = neck.forward([torch.zeros_like(x), x])  # the last of the backbone's maps counts
    assert [f.shape[2:] for f in found] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    for ours, naive in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), naive, rtol=1e-5, atol=1e-5)


def test_pyramid_is_float32_under_mixed_precision():
    neck = SimpleFeaturePyramid(8, 4)
    with torch.autocast('cpu', torch.bfloat16):
        assert {f.dtype for f in neck([torch.randn(1, 8, 4, 4)])} == {torch.float32}


@pytest.mark.parametrize(('options', 'message'), [
    (dict(scales=[4, 3]), 'scales: 3 is none of 4, 2, 1 and 0.5'),
    (dict(num_outs=3), 'num_outs=3 is less than the 4 scales')])
def test_pyramid_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(8, **options)
