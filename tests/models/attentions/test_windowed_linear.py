"""Exact windows with a linear rest, and centred keys, against the full matrix of weights written out in float64."""
from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from adala_mm.analysis import attention_entropy
from adala_mm.models.attentions.tiles import from_tiles, real_patches, to_tiles
from adala_mm.models.attentions.windowed_linear import sums_elsewhere
from helpers.layers import DIM, HEADS, LAYOUTS, WIDTH, build, error, qkv, tokens, weights, with_grads
from helpers.references.baselines import compare
from helpers.references.windowed_linear import near, windowed

CENTRED = [('Linear', {}), ('Linear', dict(feature_map='exp', dwconv=3)), ('Hedgehog', dict(variant='exp')),
           ('Hedgehog', {}), ('LoLCATS', dict(rank=3)), ('Performer', dict(num_features=20))]
GRIDS = [((4, 4), 0), ((3, 5), 1), ((1, 1), 0), ((1, 1), 5), ((16, 64), 1)]


@pytest.mark.parametrize('options', [dict(window_size=2), dict(window_size=3, feature_dim=5, dwconv=3),
                                     dict(window_size=1, feature_dim=11)], ids=str)
@pytest.mark.parametrize(('hw', 'num_prefix'), LAYOUTS, ids=str)
def test_values_and_gradients(options, hw, num_prefix):
    compare(windowed, build('WindowedLinear', **options), hw, num_prefix)


@pytest.mark.parametrize('s', [1, 4, 7])
def test_many_patches(s):
    layer = build('WindowedLinear', dim=8, heads=1, window_size=s)
    x, upstream = [t[:1, :1] for t in qkv(1025)], torch.randn(1, 1, 1025, WIDTH, dtype=torch.float64)
    wanted = with_grads(lambda *x: windowed(layer, *x, (16, 64), 1), x, upstream, layer.feature_map.parameters())
    got = with_grads(lambda *x: layer.mix(*x, (16, 64), 1), x, upstream, layer.feature_map.parameters())
    assert all(error(a, b) < 1e-9 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(('hw', 'num_prefix'), GRIDS, ids=str)
def test_a_window_of_the_whole_grid_is_softmax_attention(hw, num_prefix):
    q, k, v = qkv(num_prefix + hw[0] * hw[1], std=2)
    layer, upstream = build('WindowedLinear', window_size=64), torch.randn_like(v)
    got = with_grads(lambda *x: layer.mix(*x, hw, num_prefix), (q, k, v), upstream)
    wanted = with_grads(scaled_dot_product_attention, (q, k, v), upstream)
    assert all(error(a, b, floor=1) < 1e-12 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize('hw', [(4, 4), (3, 5), (6, 7)], ids=str)
def test_weights(hw):
    """Of two tokens near each other they have softmax's ratios, and where q is zero all are 1 at first."""
    q, k, _ = qkv(1 + hw[0] * hw[1])
    layer, inside = build('WindowedLinear', random=False, window_size=2), near(hw, 1, 2)
    w = weights(layer, q, k, hw, 1)
    assert (w > 0).all() and (w.sum(-1) - 1).abs().max() < 1e-12
    exact = (q @ k.mT / math.sqrt(WIDTH)).softmax(-1)
    for x in (w, exact):
        x *= inside
        x /= x.sum(-1, keepdim=True)
    assert error(w, exact) < 1e-12
    same = weights(layer, 0 * q, 0 * k, hw, 1)
    assert (same - 1 / q.shape[2]).abs().max() < 1e-12


@pytest.mark.parametrize('size', [30.0, 1e3, 1e5])
@pytest.mark.parametrize('num_prefix', [0, 1])
def test_large_activations(size, num_prefix):
    """Where every exponential is 0 or infinite on its own: right in float64, and finite in float32."""
    inputs = [x * scale for x, scale in zip(qkv(num_prefix + 35), (size, size, 1), strict=True)]
    layer = build('WindowedLinear', random=False, window_size=2)
    out, *grads = with_grads(lambda *x: layer.mix(*x, (5, 7), num_prefix), inputs, torch.ones_like(inputs[0]))
    assert error(out, windowed(layer, *inputs, (5, 7), num_prefix, large=True)) < 1e-4
    inputs = [x.float() for x in inputs]
    narrow = with_grads(lambda *x: layer.float().mix(*x, (5, 7), num_prefix), inputs, torch.ones_like(inputs[0]))
    assert all(x.isfinite().all() for x in (*grads, *narrow))
    matrix = weights(layer, *inputs[:2], (5, 7), num_prefix)
    assert (matrix >= 0).all() and (matrix.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize('lead', [0, 20, 100, 1000])
def test_a_key_that_outshines_the_others_from_within_a_window(lead):
    """Its window sees it exactly, and what the other windows add must not be the difference of two large numbers."""
    log_k = torch.randn(1, 1, 6, 4, 3, dtype=torch.float64)
    log_k[0, 0, 2, 1] += lead
    v = torch.rand(1, 1, 6, 4, 2, dtype=torch.float64)
    sums, shift = sums_elsewhere(log_k.float(), v.float())
    for t in range(6):
        others = [u for u in range(6) if u != t]
        logs, values = log_k[0, 0, others].flatten(0, 1), v[0, 0, others].flatten(0, 1)
        top = logs.amax(0)
        assert torch.equal(shift[0, 0, t], top.float())
        wanted = (logs - top).exp().mT @ values
        torch.testing.assert_close(sums[0, 0, t].double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_at_4097_tokens(dtype):
    layer = build('WindowedLinear', dim=16, heads=2, dtype=dtype)
    x = 3 * torch.randn(1, 4097, 16).to(dtype)
    with torch.no_grad():
        out, wanted = layer(x, (64, 64), 1), layer.double()(x.double(), (64, 64), 1)
    assert out.dtype == dtype and (out.double() - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize(('options', 'message'), [(dict(window_size=0), 'window_size=0'), (dict(dwconv=2), 'size=2'),
                                                  (dict(feature_dim=0), 'feature_dim=0')], ids=str)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build('WindowedLinear', **options)


@pytest.mark.parametrize('tile', [(1, 1), (2, 3), (1, 5), (4, 9)], ids=str)
@pytest.mark.parametrize('hw', [(1, 1), (4, 6), (3, 5)], ids=str)
def test_tiles(hw, tile):
    """Every patch stands in the tile of its place, and comes back."""
    (h, w), (th, tw) = hw, tile
    x = torch.arange(1.0, h * w + 1).view(1, 1, -1, 1)
    tiles, across = to_tiles(x, hw, tile), -(-w // tw)
    for y in range(h):
        for z in range(w):
            assert tiles[0, 0, y // th * across + z // tw, y % th * tw + z % tw, 0] == x[0, 0, y * w + z, 0]
    assert torch.equal(tiles[0, 0, :, :, 0] > 0, real_patches(hw, tile)) and int((tiles > 0).sum()) == h * w
    assert torch.equal(from_tiles(tiles, hw, tile), x)


def test_heads_share_nothing():
    q, k, v = qkv(21)
    layer = build('WindowedLinear', window_size=2)
    changed = q.clone()
    changed[:, 1] += 1
    moved = (layer.mix(changed, k, v, (4, 5), 1) - layer.mix(q, k, v, (4, 5), 1)).abs().amax((0, 2, 3))
    assert (moved > 0).tolist() == [h == 1 for h in range(HEADS)]


@pytest.mark.parametrize(('name', 'options'), CENTRED, ids=str)
def test_centred_keys(name, options):
    """As if each image had the bias of its keys that makes their mean zero; another bias changes nothing."""
    layer, plain = build(name, center_keys=True, **options), build(name, **options)
    plain.load_state_dict(layer.state_dict())
    x, upstream = tokens((4, 5), 1), torch.randn(2, 21, DIM, dtype=torch.float64)
    out, grad = with_grads(lambda x: layer(x, (4, 5), 1), [x], upstream)
    for i in range(2):
        bias = layer.qkv.bias.detach().clone()
        bias[DIM:2 * DIM] -= layer.project(x)[1][i].mean(dim=1).detach().flatten()
        plain.qkv.bias.data = bias
        assert error(plain(x[i:i + 1], (4, 5), 1), out[i:i + 1]) < 1e-12
        entropy = attention_entropy(layer, x[i:i + 1], (4, 5), 1)
        assert (entropy is None) == (name == 'Performer')
        if entropy is not None:
            torch.testing.assert_close(entropy, attention_entropy(plain, x[i:i + 1], (4, 5), 1), rtol=1e-5, atol=0)
    plain.load_state_dict(layer.state_dict())

    def centred(x):  # the same with a plain layer, whose keys are what `project` gives less their mean
        q, k, v = plain.project(x)
        mixed = plain.mix(q, k - k.sum(dim=2, keepdim=True) / 21, v, (4, 5), 1).transpose(1, 2).flatten(2)
        lora = plain.lora.delta('o') if name == 'LoLCATS' else 0
        return mixed @ (plain.proj.weight + lora).T + plain.proj.bias
    assert error(with_grads(centred, [x], upstream)[1], grad) < 1e-9
    before = plain(x, (4, 5), 1)
    for module in (layer, plain):
        module.qkv.bias.data[DIM:2 * DIM] += torch.linspace(-1, 1, DIM, dtype=torch.float64)
    assert error(layer(x, (4, 5), 1), out) < 1e-12 < 1e-4 < error(plain(x, (4, 5), 1), before)


def test_centred_keys_take_the_fast_path(monkeypatch):
    layer, x = build('Linear', center_keys=True, dtype=torch.float32), tokens((4, 5), 1).float()
    wanted = layer(x, (4, 5), 1)
    monkeypatch.setattr(sys.modules['adala_mm.ops.linear_attention'], 'linear_attention_reference', None)
    torch.testing.assert_close(layer(x, (4, 5), 1), wanted)
