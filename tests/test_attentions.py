"""What every attention in the registry promises. A new variant is tested here as soon as it is registered."""
from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Attention as TimmAttention

from adala_mm.models.attentions import Attention, SoftmaxAttention, build_attention
from adala_mm.registry import ATTENTIONS

ATTENTIONS.import_from_location()
NAMES = sorted(ATTENTIONS.module_dict)
GRIDS = [(4, 4), (3, 5), (1, 6)]
DIM, HEADS = 32, 4

every_attention = pytest.mark.parametrize('name', NAMES)


def build(name: str, **options):
    return build_attention(dict(type=f'adala_mm.{name}', **options), DIM, HEADS).eval()


def tokens(hw, num_prefix, batch=2):
    return torch.randn(batch, num_prefix + hw[0] * hw[1], DIM)


def test_registry_is_not_empty():
    assert {'LinearAttention', 'SoftmaxAttention'} <= set(NAMES)


@every_attention
@pytest.mark.parametrize('qkv_bias', [True, False])
def test_keys_of_timm(name, qkv_bias):
    timm_state = TimmAttention(DIM, HEADS, qkv_bias=qkv_bias).state_dict()
    layer = build_attention({'type': f'adala_mm.{name}'}, DIM, HEADS, qkv_bias=qkv_bias)
    own = {key: value.shape for key, value in layer.state_dict().items() if key.startswith(('qkv.', 'proj.'))}
    assert own == {key: value.shape for key, value in timm_state.items()}
    result = layer.load_state_dict(timm_state, strict=False)
    assert not result.unexpected_keys
    # What is missing belongs to a submodule of the variant, which load_vit tells apart by its name.
    assert not [key for key in result.missing_keys if key.startswith(('qkv.', 'proj.')) or '.' not in key]
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in timm_state.items())


@every_attention
@pytest.mark.parametrize('hw', GRIDS, ids=str)
@pytest.mark.parametrize('num_prefix', [0, 1, 5])
def test_shape_and_independent_samples(name, hw, num_prefix):
    layer, x = build(name), tokens(hw, num_prefix)
    with torch.no_grad():
        out = layer(x, hw, num_prefix)
        alone = layer(x[1:], hw, num_prefix)
        torch.testing.assert_close(layer.proj(layer.attend(x, hw, num_prefix)), out)
        assert torch.equal(layer(x, hw, num_prefix), out)
    assert out.shape == x.shape and out.dtype == x.dtype and out.isfinite().all()
    torch.testing.assert_close(out[1:], alone, rtol=1e-5, atol=1e-6)


@every_attention
def test_tokens_are_mixed(name):
    layer, x = build(name), tokens((3, 5), 1)
    changed = x.clone()
    changed[:, 7] += 1
    with torch.no_grad():
        moved = (layer(changed, (3, 5), 1) - layer(x, (3, 5), 1)).abs().amax(-1)
    assert (moved[:, [0, 6, 8]] > 1e-6).all()  # the class token and both neighbours notice


@every_attention
def test_gradients_reach_the_projections(name):
    layer, x = build(name).train(), tokens((3, 5), 1).requires_grad_()
    layer(x, (3, 5), 1).square().sum().backward()
    for part in (*layer.qkv.weight.grad.chunk(3), layer.proj.weight.grad, layer.proj.bias.grad, x.grad):
        assert part.isfinite().all() and part.abs().max() > 1e-6


@every_attention
def test_bf16_autocast(name):
    layer, x = build(name), tokens((8, 9), 1)
    with torch.no_grad():
        wanted = layer(x, (8, 9), 1)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = layer(x * 1.0, (8, 9), 1)
        big = layer(x * 1e3, (8, 9), 1)
    (out.float().square().sum() + big.float().square().mean()).backward()
    assert (out.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert big.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@every_attention
def test_bad_arguments(name):
    with pytest.raises(ValueError, match='num_heads=5 .* 32'):
        build_attention({'type': f'adala_mm.{name}'}, 32, 5)
    with pytest.raises((TypeError, ValueError), match='nonsense'):
        build(name, nonsense=1)


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_softmax_attention_equals_timm(qkv_bias):
    timm_layer = TimmAttention(DIM, HEADS, qkv_bias=qkv_bias)
    layer = SoftmaxAttention(DIM, HEADS, qkv_bias=qkv_bias)
    layer.load_state_dict(timm_layer.state_dict())
    x = 3 * tokens((3, 5), 1)
    torch.testing.assert_close(layer(x, (3, 5), 1), timm_layer(x))


@pytest.mark.parametrize('feature_map', ['elu1', 'relu', 'softplus', 'softmax', 'exp'])
def test_linear_attention_uses_its_feature_map(feature_map):
    from adala_mm.ops import linear_attention
    layer, x = build('LinearAttention', feature_map=feature_map, eps=0.5), tokens((3, 5), 1)
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
    wanted = layer.proj(linear_attention(q, k, v, feature_map, 0.5).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, (3, 5), 1), wanted)


def test_linear_attention_rejects_an_unknown_feature_map():
    with pytest.raises(ValueError, match="'elu'.*elu1, relu"):
        build('LinearAttention', feature_map='elu')


@pytest.mark.parametrize('kind', ['adala_mm.LinearAtention', 'LinearAtention'])
def test_unknown_type_names_the_close_one(kind):
    with pytest.raises(ValueError) as info:
        build_attention({'type': kind}, DIM, HEADS)
    message = str(info.value)
    assert repr(kind) in message and 'Did you mean adala_mm.LinearAttention?' in message
    assert all(f'adala_mm.{name}' in message for name in NAMES)


@pytest.mark.parametrize('cfg', [{'type': 'adala_mm.Qwerty'}, {}], ids=str)
def test_unknown_type_without_a_close_one(cfg):
    with pytest.raises(ValueError, match='Registered: .*adala_mm.SoftmaxAttention') as info:
        build_attention(cfg, DIM, HEADS)
    assert 'Did you mean' not in str(info.value)


class OwnAttention(Attention):
    def mix(self, q, k, v, hw, num_prefix):
        return v


@pytest.mark.parametrize('kind', [OwnAttention, f'{__name__}.OwnAttention'])
def test_own_attention_needs_no_registration(kind):
    assert type(build_attention({'type': kind}, 32, 4)) is OwnAttention


@pytest.mark.parametrize('kind', ['torch.nn.Linear', 'no_such_module.Layer', f'{__name__}.NoSuchLayer', None])
def test_what_is_no_attention_raises(kind):
    with pytest.raises(ValueError, match='unknown attention type.*adala_mm.LinearAttention'):
        build_attention({'type': kind}, 32, 4)


def test_error_inside_an_own_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / 'own_broken.py').write_text('import no_such_library')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match='no_such_library'):
        build_attention({'type': 'own_broken.Layer'}, 32, 4)
