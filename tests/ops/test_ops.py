"""The tensor functions against slow float64 transcriptions of their formulas."""
from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from adala_mm.ops import FEATURE_MAPS, linear_attention, ms_deform_attn
from adala_mm.ops.deformable_attention import ms_deform_attn_backward, ms_deform_attn_forward

PHI = {
    'elu1': lambda x: F.elu(x) + 1,
    'relu': lambda x: x.clamp(min=0),
    'softplus': lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    'softmax': lambda x: torch.exp(x - x.logsumexp(-1, keepdim=True)),
    'exp': torch.exp,
}
MAPS = sorted([*PHI, 'efficient'])


def features(q, k, name):
    if name == 'efficient':  # of keys each channel is normalised over the tokens
        return PHI['softmax'](q), torch.exp(k - k.logsumexp(-2, keepdim=True))
    return PHI[name](q), PHI[name](k)


def quadratic(q, k, v, name, eps=1e-6):
    weights = torch.einsum('bhid,bhjd->bhij', *features(q, k, name))
    return torch.einsum('bhij,bhjd->bhid', weights / (weights.sum(-1, keepdim=True) + eps), v)


def linear(q, k, v, name, eps=1e-6):
    """The same in float64 with the sums over keys first: for lengths at which N^2 weights are too many."""
    q, k = features(q, k, name)
    return (q @ (k.transpose(-2, -1) @ v)) / ((q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True) + eps)


def exp_by_logsumexp(q, k, v):
    logits = torch.logsumexp(q.unsqueeze(-2) + k.unsqueeze(-3), dim=-1)
    return logits.softmax(-1) @ v


def qkv(batch, heads, n, m, dim, std=1.0, dtype=torch.float32):
    return [(torch.randn(batch, heads, length, dim) * std).to(dtype) for length in (n, m, m)]


def with_grads(function, inputs, upstream):
    """Output and gradients with respect to the inputs, all in the dtype of the inputs."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def error(got, wanted, floor=0.0):
    """Largest difference relative to the largest value (or to ``floor``, where the exact result is about zero)."""
    return float((got.double() - wanted).abs().max() / max(float(wanted.abs().max()), floor))


def test_every_feature_map_is_covered():
    assert sorted(FEATURE_MAPS) == sorted([*MAPS, 'identity'])


def test_identity_takes_features_that_are_there_already():
    q, k, v = qkv(2, 3, 17, 17, 8)
    torch.testing.assert_close(linear_attention(F.softplus(q), F.softplus(k), v, 'identity'),
                               linear_attention(q, k, v, 'softplus'))


@pytest.mark.parametrize('name', MAPS)
@pytest.mark.parametrize('shape', [(1, 1, 1, 1, 8), (2, 3, 17, 17, 8), (1, 2, 65, 65, 80), (2, 1, 5, 33, 80),
                                   (1, 2, 33, 2, 80)], ids=str)
def test_values_and_gradients(name, shape):
    inputs = qkv(*shape)
    upstream = torch.randn(inputs[0].shape)
    got = with_grads(lambda *t: linear_attention(*t, feature_map=name), inputs, upstream)
    wanted = with_grads(lambda *t: quadratic(*t, name), [t.double() for t in inputs], upstream.double())
    # With one key the output is that key's value, so that q and k have no gradient to be relative to.
    floors = [0, 1, 1, 0] if shape[3] == 1 else [0, 0, 0, 0]
    for what, a, b, floor in zip(('out', 'q', 'k', 'v'), got, wanted, floors, strict=True):
        assert a.dtype == torch.float32 and error(a, b, floor) < 1e-5, what


@pytest.mark.parametrize('name', MAPS)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 1e-3), (torch.bfloat16, 6e-3)], ids=str)
def test_half_precision_at_length_16385(name, dtype, tolerance):
    inputs = qkv(1, 2, 16385, 16385, 8, std=30, dtype=dtype)
    upstream = torch.randn(inputs[0].shape).to(dtype)
    got = with_grads(lambda *t: linear_attention(*t, feature_map=name), inputs, upstream)
    wanted = with_grads(lambda *t: linear(*t, name), [t.double() for t in inputs], upstream.double())
    for what, a, b in zip(('out', 'q', 'k', 'v'), got, wanted, strict=True):
        assert a.dtype == dtype and a.isfinite().all(), what
        assert error(a, b) < tolerance, what


@pytest.mark.parametrize('name', MAPS)
def test_autocast_keeps_float32(name):
    inputs = qkv(1, 2, 1025, 1025, 16)
    wanted = linear(*(t.double() for t in inputs), name)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got, in_bf16 = linear_attention(*inputs, feature_map=name), linear(*inputs, name)
    assert error(got, wanted) < min(1e-5, error(in_bf16, wanted) / 100)


@pytest.mark.parametrize('name', MAPS)
def test_autocast_with_bf16_inputs_is_exact_up_to_the_output(name):
    inputs = qkv(1, 2, 1025, 1025, 16, dtype=torch.bfloat16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = linear_attention(*inputs, feature_map=name)
    wanted = linear(*(t.double() for t in inputs), name)
    assert got.dtype == torch.bfloat16
    # Each value may be off by half a unit in the last of bfloat16's 8 digits, and by no more.
    assert (got.double() - wanted).abs().sub(wanted.abs() * 2 ** -8 * 1.01).max() < 1e-5


def test_elu1_gradient_at_large_inputs():
    x = torch.tensor([-1e30, -1e4, -200.0, -1.0, 1.0, 200.0, 1e4, 1e30], requires_grad=True)
    for phi in FEATURE_MAPS['elu1'](x, x):
        grad, = torch.autograd.grad(phi.sum(), x)
        torch.testing.assert_close(grad, x.detach().clamp(max=0).exp())


@pytest.mark.parametrize('shift', [(0, 0), (200, -200), (-200, 200), (-200, -200), (200, 200)], ids=str)
def test_exp_map_at_size_200(shift):
    q, k, v = qkv(1, 2, 7, 33, 8)
    # Each feature sits at +200 or -200: no common shift of all features or of all keys would be enough.
    q = q + shift[0] + 200 * torch.randn(1, 1, 7, 8).sign()
    k = k + shift[1] + 200 * torch.randn(1, 1, 1, 8).sign()
    upstream = torch.randn(q.shape)
    got = with_grads(lambda *t: linear_attention(*t, feature_map='exp'), (q, k, v), upstream)
    wanted = with_grads(exp_by_logsumexp, [t.double() for t in (q, k, v)], upstream.double())
    for what, a, b in zip(('out', 'q', 'k', 'v'), got, wanted, strict=True):
        # The last digit of a float32 around 800 is worth 6e-5, and exp makes that a relative error.
        assert a.isfinite().all() and error(a, b, floor=0.1) < 3e-4, what


@pytest.mark.parametrize('name', MAPS)
@pytest.mark.parametrize(('n', 'm'), [(1, 1), (9, 9), (5, 300)])
def test_rows_sum_to_one(name, n, m):
    q, k, v = qkv(2, 2, n, m, 32)
    out = linear_attention(q, k, torch.ones_like(v), feature_map=name)
    # Not closer: softmax features of one key give a denominator of about 1/32, of which eps is 3e-5.
    torch.testing.assert_close(out, torch.ones_like(q), rtol=0, atol=1e-4)


def test_relu_query_that_attends_to_nothing_gives_zero():
    q, k, v = qkv(1, 1, 3, 5, 8)
    out = linear_attention(-q.abs(), k, v, feature_map='relu')
    assert (out == 0).all()


def test_unknown_feature_map():
    with pytest.raises(ValueError) as info:
        linear_attention(*qkv(1, 1, 2, 2, 4), feature_map='elu')
    assert "'elu'" in str(info.value) and all(name in str(info.value) for name in MAPS)


def deformable_inputs():
    """Three non-square levels; about a third of the points lies outside of [0, 1]."""
    shapes = torch.tensor([[5, 3], [2, 6], [1, 4]])
    value = torch.randn(2, int(shapes.prod(1).sum()), 2, 3, dtype=torch.float64)
    locations = torch.rand(2, 4, 2, 3, 2, 2, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.randn(2, 4, 2, 3, 2, dtype=torch.float64)
    return value, shapes, locations, weights


def sample(level, x, y):
    """Bilinear value of ``level`` (h, w, D) at (x, y) in [0, 1], pixel centres at (i + 0.5) / size, zero outside."""
    h, w, dim = level.shape
    x, y = x * w - 0.5, y * h - 0.5
    out = torch.zeros(dim, dtype=level.dtype)
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < h and 0 <= j < w:
                out += (1 - abs(y - i)) * (1 - abs(x - j)) * level[i, j]
    return out


def deformable_by_loops(value, shapes, locations, weights):
    batch, queries, heads, levels, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    start = [0, *shapes.prod(1).cumsum(0).tolist()]
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                for n in range(levels):
                    level = value[b, start[n]:start[n + 1], h].reshape(*shapes[n].tolist(), -1)
                    for p in range(points):
                        x, y = locations[b, q, h, n, p].tolist()
                        out[b, q, h] += weights[b, q, h, n, p] * sample(level, x, y)
    return out.flatten(2)


def test_ms_deform_attn_forward():
    inputs = deformable_inputs()
    wanted = deformable_by_loops(*inputs)
    torch.testing.assert_close(ms_deform_attn(*inputs), wanted)
    got = ms_deform_attn_forward(*inputs[:2], torch.tensor([0, 15, 27]), *inputs[2:], im2col_step=64)
    torch.testing.assert_close(got, wanted)
    outside = (inputs[2] < 0) | (inputs[2] > 1)
    assert 0.1 < outside.double().mean() < 0.9  # both sorts of points were there


def test_ms_deform_attn_gradcheck():
    value, shapes, locations, weights = deformable_inputs()
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, shapes, x, w), inputs)


def test_ms_deform_attn_backward_equals_autograd():
    value, shapes, locations, weights = deformable_inputs()
    upstream = torch.randn(2, 4, 6, dtype=torch.float64)
    wanted = with_grads(lambda v, x, w: ms_deform_attn(v, shapes, x, w), (value, locations, weights), upstream)[1:]
    got = [torch.zeros_like(t) for t in (value, locations, weights)]
    with torch.no_grad():  # as inside the backward of an autograd.Function
        ms_deform_attn_backward(value, shapes, torch.tensor([0, 15, 27]), locations, weights, upstream, *got,
                                im2col_step=64)
    torch.testing.assert_close(got, wanted)


def test_meta_tensors_pass():
    q = torch.empty(1, 2, 5, 4, device='meta')
    assert linear_attention(q, q, q).shape == q.shape
