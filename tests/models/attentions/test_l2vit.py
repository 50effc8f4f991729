"""L2ViT's attentions against transcriptions of their formulas."""
from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS
from torch.nn import functional as F

from adala_mm.models.attentions.l2vit import L2ViTAttention, LocalConcentration, WindowAttention
from adala_mm.models.backbones import L2ViT
from helpers import tiny_vit
from helpers.layers import without_code
from helpers.references.l2vit import SMALL, naive_global, naive_local, naive_window, project, randomise

DIM, HEADS, WINDOW = 12, 3, 3
GRIDS = [((4, 4), 0), ((3, 5), 1), ((6, 3), 0), ((1, 4), 5), ((7, 6), 3)]
every_grid = pytest.mark.parametrize(('hw', 'num_prefix'), GRIDS, ids=str)


def tokens(hw, num_prefix, dim=DIM):
    return torch.randn(2, num_prefix + hw[0] * hw[1], dim, dtype=torch.float64, requires_grad=True)


def assert_same(ours, naive, layer, x):
    """Values, and gradients of a random projection with respect to the input and all parameters."""
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-10)
    direction = torch.randn_like(naive)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    wanted = torch.autograd.grad(naive, (x, *parameters), direction, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(ours, (x, *parameters), direction, allow_unused=True, materialize_grads=True)
    for name, a, b in zip(('input', *names), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f'{name}: {text}')


# --- attentions -------------------------------------------------------------------------------------------------------


@every_grid
@pytest.mark.parametrize('regime', ['below', 'around', 'above'])
def test_global_attention(hw, num_prefix, regime):
    layer, x = randomise(L2ViTAttention(DIM, HEADS)), tokens(hw, num_prefix)
    weights = naive_global(layer, x, 1.0)[1]
    positive = weights[weights > 0].sort().values
    middle = positive[int(0.4 * len(positive)):int(0.6 * len(positive)) + 2]
    gap = middle.diff().argmax()  # at an element itself the last bit would decide whether it is clamped
    around = middle[gap:gap + 2].mean()
    layer.denom_floor = {'below': 2 * positive[-1], 'around': around, 'above': positive[0] / 2}[regime]
    assert ((weights - layer.denom_floor).abs() > 1e-6 * layer.denom_floor).all()
    wanted, _ = naive_global(without_code(layer), x, layer.denom_floor)
    assert_same(layer(x, hw, num_prefix), project(layer, wanted), layer, x)
    clamped = (weights < layer.denom_floor).double().mean()
    assert {'below': clamped == 1, 'around': 0.2 < clamped < 0.8, 'above': clamped < 0.2}[regime]


def test_global_attention_of_ones_is_the_floor():
    layer = randomise(L2ViTAttention(DIM, HEADS))
    with torch.no_grad():
        layer.qkv.weight[2 * DIM:].zero_()
        layer.qkv.bias[2 * DIM:].fill_(1)
        layer.tau['scale'].copy_(torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1))
        for scale in (0.3, 2, 30):
            x = scale * tokens((5, 5), 1)
            weights = naive_global(layer, x, 1.0)[1].view(2, HEADS, -1)
            wanted = torch.tensor([0.5, -1.0, 2.0])[:, None] * torch.clamp(weights / 100, max=1)  # (2, H, N)
            found = layer.attend(x, (5, 5), 1)
            torch.testing.assert_close(found, wanted.transpose(1, 2).repeat_interleave(DIM // HEADS, dim=2))


def test_scale_starts_at_head_width():
    assert torch.equal(L2ViTAttention(64, 4).tau['scale'], torch.full((4, 1, 1), 0.25))


@every_grid
@pytest.mark.parametrize('norm', ['bn', 'ln'])
def test_local_concentration(hw, num_prefix, norm):
    layer, x = randomise(LocalConcentration(DIM, norm)).eval(), tokens(hw, num_prefix)
    out = layer(x, hw, num_prefix)
    assert (out[:, :num_prefix] == 0).all()
    assert_same(out, naive_local(layer, x, hw, num_prefix), layer, x)


def test_local_concentration_in_training():
    x = tokens((4, 5), 0)
    for norm, apart in (('bn', False), ('ln', True)):
        layer = randomise(LocalConcentration(DIM, norm)).train()
        assert torch.allclose(layer(x, (4, 5))[:1], layer(x[:1], (4, 5))) == apart


@every_grid
@pytest.mark.parametrize('mask_padding', [True, False])
def test_window_attention(hw, num_prefix, mask_padding):
    layer = randomise(WindowAttention(DIM, HEADS, window_size=WINDOW, mask_padding=mask_padding))
    x = tokens(hw, num_prefix)
    wanted = naive_window(without_code(layer), x, hw, num_prefix)
    assert_same(layer(x, hw, num_prefix), project(layer, wanted), layer, x)


def test_window_attention_without_bias_pads_with_zeros():
    layer = randomise(WindowAttention(DIM, HEADS, qkv_bias=False, window_size=WINDOW, mask_padding=False))
    x = tokens((4, 5), 0)
    assert_same(layer(x, (4, 5), 0), project(layer, naive_window(layer, x, (4, 5))), layer, x)


def test_window_of_the_whole_grid_is_softmax_attention():
    from adala_mm.models.attentions import SoftmaxAttention
    layer, softmax = WindowAttention(DIM, HEADS, window_size=9).double(), SoftmaxAttention(DIM, HEADS).double()
    softmax.load_state_dict(layer.state_dict())
    for hw, num_prefix in GRIDS:
        x = tokens(hw, num_prefix)
        torch.testing.assert_close(layer(x, hw, num_prefix), softmax(x, hw, num_prefix))


@every_grid
def test_local_concentration_inside_the_attention(hw, num_prefix):
    plain, layer = L2ViTAttention(DIM, HEADS).double(), L2ViTAttention(DIM, HEADS, local_concentration=True).double()
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = tokens(hw, num_prefix)
    assert torch.equal(layer(x, hw, num_prefix), plain(x, hw, num_prefix))  # to begin with
    randomise(layer)
    y = project(layer, naive_global(layer, x, 100.0)[0])
    norm = layer.local['norm']
    local = naive_local(layer.local['lcm'], F.layer_norm(y, (DIM,), norm.weight, norm.bias), hw, num_prefix)
    assert_same(layer(x, hw, num_prefix), y + local, layer, x)


def test_attentions_in_a_plain_vit(pretrained):
    attention = [dict(type='adala_mm.WindowAttention', window_size=3),
                 dict(type='adala_mm.L2ViTAttention', local_concentration=True, denom_floor=10.0)]
    image = torch.randn(2, 3, 40, 24)
    for init_cfg in (None, pretrained):
        model = MODELS.build(tiny_vit(attention=attention, init_cfg=init_cfg))
        model.init_weights()
        assert all((p == 0).all() for p in model.blocks[1].attn.local['lcm'].conv2.parameters())
        assert (model.blocks[1].attn.tau['scale'] == 8 ** -0.5).all()
        assert model(image)[0].isfinite().all()
    state = torch.load(pretrained['checkpoint'])
    assert torch.equal(model.blocks[1].attn.qkv.weight, state['blocks.1.attn.qkv.weight'])


@pytest.mark.parametrize(('build', 'message'), [
    (lambda: L2ViTAttention(DIM, HEADS, denom_floor=0), 'denom_floor=0 must be positive'),
    (lambda: WindowAttention(DIM, HEADS, window_size=0), 'window_size=0'),
    (lambda: LocalConcentration(DIM, 'gn'), "'gn'.*bn, ln"),
    (lambda: L2ViT('huge'), "'huge'.*tiny, small, base.*embed_dims, depths, num_heads"),
    (lambda: L2ViT(dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))), 'four numbers for each of embed_dims'),
    (lambda: L2ViT(dict(SMALL, depths=(2, 2, 2))), 'four numbers'),
    (lambda: L2ViT(dict(SMALL, embed_dims=(7, 12, 16, 24))), 'first width.*even'),
    (lambda: L2ViT(dict(SMALL, num_heads=(1, 5, 2, 3))), 'num_heads=5 does not divide the width 12'),
    (lambda: L2ViT(SMALL, out_indices=(1, 4)), r'\(1, 4\).*stages are 0, 1, 2 and 3'),
    (lambda: L2ViT(SMALL, out_type='cls_token'), "'cls_token'.*featmap, avg_featmap"),
], ids=lambda value: value[:20] if isinstance(value, str) else '')
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
