"""The depth-wise convolution on the values, against its formula."""
from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

from adala_mm import align, linearize
from adala_mm.models.attentions import Attention, HedgehogAttention, LinearAttention
from helpers import LINEAR
from helpers.options import DWCONV, images, stage1, stage2, step

KINDS = [LinearAttention, HedgehogAttention]  # of attention that may have one


# --- depth-wise convolution on v -------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dwconv', [1, 3, 5])
def test_dwconv_starts_as_the_plain_layer_bit_for_bit(kind, dwconv):
    layer = kind(32, 4, dwconv=dwconv)
    assert sum(p.numel() for p in layer.dwconv.parameters()) == 32 * dwconv ** 2 + 32
    plain = kind(32, 4)
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if 'dwconv' not in key})
    x = torch.randn(2, 1 + 12, 32)
    assert torch.equal(layer(x, (3, 4), 1), plain(x, (3, 4), 1))
    q, k, v = layer.project(x)
    assert torch.equal(layer.mix(q, k, v, (3, 4), 1), plain.mix(q, k, v, (3, 4), 1))


@pytest.mark.parametrize('num_prefix', [0, 1, 5])
@pytest.mark.parametrize('kind', KINDS)
def test_dwconv_against_its_formula(kind, num_prefix):
    """Values and gradients, against loops in float64."""
    h, w, dim, heads, size = 3, 5, 16, 4, 3
    layer = kind(dim, heads, dwconv=size)
    for parameter in layer.dwconv.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, num_prefix + h * w, dim, requires_grad=True)
    got = layer.attend(x, (h, w), num_prefix)

    reference = copy.deepcopy(layer).double()
    y = x.detach().double().requires_grad_()
    q, k, v = reference.project(y)
    features = [F.elu(q) + 1, F.elu(k) + 1]
    if kind is HedgehogAttention:  # its maps are the identity before they learn
        features = [torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1) for y in (q, k)]
    scores = features[0] @ features[1].transpose(-2, -1)
    mixed = (scores / scores.sum(-1, keepdim=True)) @ v
    mixed = mixed.transpose(1, 2).flatten(2)
    values = v.transpose(1, 2).flatten(2)[:, num_prefix:].unflatten(1, (h, w))
    rows = []
    for i in range(h):
        for j in range(w):
            total = reference.dwconv.bias.expand(2, dim)
            for a in range(size):
                for b in range(size):
                    y0, x0 = i + a - size // 2, j + b - size // 2
                    if 0 <= y0 < h and 0 <= x0 < w:
                        total = total + reference.dwconv.weight[:, 0, a, b] * values[:, y0, x0]
            rows.append(total)
    wanted = mixed + F.pad(torch.stack(rows, dim=1), (0, 0, num_prefix, 0))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    # Class and register tokens get none.
    assert torch.equal(got[:, :num_prefix], without_conv(layer).attend(x, (h, w), num_prefix)[:, :num_prefix])

    weight = torch.randn_like(got)
    learners = [x, layer.qkv.weight, *layer.dwconv.parameters()]
    theirs = [y, reference.qkv.weight, *reference.dwconv.parameters()]
    for a, b in zip(torch.autograd.grad((got * weight).sum(), learners),
                    torch.autograd.grad((wanted * weight).sum(), theirs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def without_conv(layer: Attention) -> Attention:
    layer = copy.deepcopy(layer)
    layer.dwconv = None
    return layer


def test_both_ways_through_the_layer_agree():
    layer = LinearAttention(32, 4, dwconv=3)
    torch.nn.init.normal_(layer.dwconv.weight)
    x = torch.randn(2, 13, 32)
    slow = super(LinearAttention, layer).attend(x, (3, 4), 1)  # by `mix`, as adapters with norms of q and k go
    torch.testing.assert_close(layer.attend(x, (3, 4), 1), slow)


@pytest.mark.parametrize('kind', KINDS)
def test_only_dwconv_knows_places(kind):
    assert kind(32, 4, dwconv=3).positional and not kind(32, 4).positional
    assert not kind.positional


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', [0, 2, -1])
def test_bad_dwconv_raises(kind, size):
    with pytest.raises(ValueError, match=f'kernel_size={size} must be odd and positive'):
        kind(32, 4, dwconv=size)


def test_dwconv_learns_in_both_stages_and_its_checkpoint_goes_on(pretrained, tmp_path):
    model = stage1(pretrained, DWCONV)
    step(model)  # which says that all of it learns
    learners = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert learners == {f'blocks.{i}.attn.{part}.{kind}' for i in (0, 1) for part in ('qkv', 'dwconv')
                        for kind in ('weight', 'bias')}
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'stage1.pth')
    student = dict(attention=DWCONV, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'stage1.pth')))
    second = stage2(pretrained, student=student)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in second.state_dict().items())
    assert any(key.endswith('dwconv.weight') for key in second.state_dict())
    assert second.backbone.blocks[0].attn.dwconv.weight.abs().max() > 0
    step(second)
    # A student without it does not take that checkpoint in silence.
    with pytest.raises(ValueError, match=r'unexpected +blocks\.\*\.attn\.dwconv\.weight'):
        stage2(pretrained, student=student | dict(attention=LINEAR))


@pytest.mark.parametrize('qk_norm', [False, True])
def test_dwconv_in_a_linearized_timm_vit(qk_norm):
    options = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0, qk_norm=qk_norm)
    teacher = timm.models.vision_transformer.VisionTransformer(**options, dynamic_img_size=True).eval()
    plain, model = linearize(teacher, 'linear'), linearize(teacher, dict(type='linear', dwconv=3))
    x = images(2, (32, 48))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-6, atol=1e-6)
    align(model, teacher, [x], stage=1, steps=2, lr=1e-2)
    assert all(block.attn.dwconv.weight.abs().max() > 0 for block in model.blocks)
    align(model, teacher, [x], stage=2, steps=1, lr=1e-2)
    state = model.state_dict()
    assert 'blocks.0.attn.dwconv.weight' in state and set(teacher.state_dict()) < set(state)
