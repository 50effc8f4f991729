"""Open tiles and means of closed ones against the same written out, query by query, in float64."""
from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from adala_mm.models.attentions.tiles import nested_tiles
from helpers.layers import build, error, qkv, with_grads, without_code
from helpers.references.coarse_to_fine import coarse_to_fine

OPTIONS = [dict(tile=2, num_open=2, block=4), dict(tile=2, num_open=2, block=4, levels=2),
           dict(tile=3, num_open=3, block=2), dict(tile=1, num_open=2, block=3, levels=3), dict(num_open=1),
           dict(tile=5, block=64)]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('num_prefix', [0, 1, 5])
@pytest.mark.parametrize('hw', [(4, 4), (3, 5), (1, 1), (9, 20)], ids=str)
def test_values_and_gradients(options, hw, num_prefix):
    layer, inputs = build('CoarseToFine', **options), qkv(num_prefix + hw[0] * hw[1], std=2)
    upstream = torch.randn_like(inputs[0])
    got = with_grads(lambda *x: layer.mix(*x, hw, num_prefix), inputs, upstream)
    bare = without_code(layer)
    wanted = with_grads(lambda *x: coarse_to_fine(bare, *x, hw, num_prefix), inputs, upstream)
    assert all(error(a, b, floor=1) < 1e-10 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize('options', [dict(), dict(num_open=5, levels=3)], ids=str)
def test_many_patches(options):
    layer, inputs = build('CoarseToFine', **options), [x[:1] for x in qkv(1025, std=2)]
    wanted = coarse_to_fine(layer, *inputs, (16, 64), 1)
    assert error(layer.mix(*inputs, (16, 64), 1), wanted) < 1e-10
    exact = scaled_dot_product_attention(*inputs)
    assert error(layer.mix(*inputs, (16, 64), 1), exact) > 1e-3  # what is tested is not softmax


@pytest.mark.parametrize('levels', [1, 3])
@pytest.mark.parametrize('hw', [(4, 4), (3, 5), (1, 1), (7, 13)], ids=str)
def test_all_tiles_open_is_softmax_attention(hw, levels):
    layer, inputs = build('CoarseToFine', tile=2, block=3, num_open=64, levels=levels), qkv(1 + hw[0] * hw[1], std=2)
    upstream = torch.randn_like(inputs[0])
    got = with_grads(lambda *x: layer.mix(*x, hw, 1), inputs, upstream)
    wanted = with_grads(scaled_dot_product_attention, inputs, upstream)
    assert all(error(a, b, floor=1) < 1e-12 for a, b in zip(got, wanted, strict=True))


def test_equal_tokens_of_a_tile_are_softmax_attention():
    """A mean stands for what it is the mean of: closed tiles cost nothing where their tokens are alike."""
    q, *kv = qkv(16 * 16)
    k, v = (x.unflatten(2, (16, 16))[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3).flatten(2, 3)
            for x in kv)
    got = build('CoarseToFine', num_open=2).mix(q, k, v, (16, 16), 0)
    assert error(got, scaled_dot_product_attention(q, k, v)) < 1e-12


@pytest.mark.parametrize('levels', [1, 2])
def test_the_tile_whose_mean_is_wrong_is_open(levels):
    """However little weight it has: the means of all other tiles are exact."""
    q, *kv = qkv(8 * 8)
    kv = [x.unflatten(2, (8, 8))[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3) for x in kv]
    for x in kv:
        x[:, :, 4:6, 6:] += torch.randn_like(x[:, :, 4:6, 6:])
    kv[0][:, :, :4, :4] += 2 * q[:, :, :1, None]  # tiles of much weight
    k, v = (x.flatten(2, 3) for x in kv)
    got = build('CoarseToFine', tile=2, num_open=1, block=8, levels=levels).mix(q, k, v, (8, 8), 0)
    assert error(got, scaled_dot_product_attention(q, k, v)) < 1e-12


def test_tiles_are_nested():
    """Four tiles that follow each other are the quarters of one, whatever the level."""
    places = torch.cartesian_prod(torch.arange(8), torch.arange(16))[None, None].double()
    tiles = nested_tiles(places, (8, 16), 2, 3)  # (1, 1, 32, 4, 2)
    for level in range(3):
        cells = (tiles // (2 << level)).view(32 // 4 ** level, -1, 2)
        assert (cells == cells[:, :1]).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_large_activations_are_finite(dtype):
    layer, inputs = build('CoarseToFine', tile=2, num_open=2, block=4).to(dtype), qkv(1 + 36, std=20)
    inputs = [x.to(dtype) for x in inputs]
    assert all(x.isfinite().all() for x in with_grads(lambda *x: layer.mix(*x, (6, 6), 1), inputs, inputs[0]))


@pytest.mark.parametrize('option', ['tile', 'num_open', 'block', 'levels'])
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=f'{option}=0.* at least 1'):
        build('CoarseToFine', **{option: 0})
