"""Rotary positions and gated MLPs against timm's DINOv3, against complex numbers, and in every attention."""
from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_vit
from timm import create_model
from timm.models.eva import Eva
from torch import nn

from adala_mm import linearize
from adala_mm.models.attentions import Attention, build_attention
from adala_mm.ops import RotaryPositions
from adala_mm.registry import ATTENTIONS, MODELS

ATTENTIONS.import_from_location()
NAMES = sorted(ATTENTIONS.module_dict)
SOFTMAX = {'type': 'adala_mm.SoftmaxAttention'}
GRIDS = ((4, 4), (5, 3), (2, 9), (11, 7))
# timm's name of each published size: what `AdaLAViT` is told beside what all have.
SIZES = {
    'vit_small_patch16_dinov3': dict(embed_dim=384, num_heads=6),
    'vit_small_plus_patch16_dinov3': dict(embed_dim=384, num_heads=6, swiglu=True),
    'vit_base_patch16_dinov3': dict(embed_dim=768, num_heads=12),
    'vit_large_patch16_dinov3': dict(embed_dim=1024, num_heads=16),
    'vit_huge_plus_patch16_dinov3': dict(embed_dim=1280, num_heads=20, swiglu=True),
    'vit_base_patch16_dinov3_qkvb': dict(embed_dim=768, num_heads=12, qkv_bias=True),
}
DINOV3 = dict(img_size=256, patch_size=16, num_registers=4, layer_scale=1e-5, norm_eps=1e-5, qkv_bias=False,
              rotary=dict())
# A narrow one of timm's, and ours.
NARROW = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0, dynamic_img_size=True,
              use_rot_pos_emb=True, rope_type='dinov3', rope_temperature=100, rope_rotate_half=True,
              use_abs_pos_emb=False, num_reg_tokens=4, init_values=1e-5, qkv_bias=False, use_fc_norm=False)


def awake(model: nn.Module) -> nn.Module:
    """Every part off its neutral start: LayerScale of 1e-5 would hide the blocks."""
    for name, parameter in model.named_parameters():
        fan = parameter.shape[1] if parameter.ndim == 2 else 16
        nn.init.normal_(parameter, mean=float('norm' in name and 'weight' in name or 'gamma' in name),
                        std=fan ** -0.5 / 2)
    return model.eval()


def narrow(**changes) -> Eva:
    return awake(Eva(**NARROW | changes))


def own(**changes) -> nn.Module:
    return MODELS.build(tiny_vit(num_registers=4, layer_scale=1.0, qkv_bias=False, rotary=dict()) | changes)


def loaded(theirs: Eva, path, **options) -> nn.Module:
    """Our ViT with timm's weights, by way of a file."""
    torch.save(theirs.state_dict(), path)
    model = own(init_cfg=dict(type='Pretrained', checkpoint=str(path)), **options)
    model.init_weights()
    return model.eval()


def with_grads(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """Features, and gradients of the image and of the first block's projections."""
    image = image.clone().requires_grad_()
    tokens = model.forward_features(image)
    weights = [model.blocks[0].attn.qkv.weight, model.blocks[0].mlp.fc2.weight, model.reg_token]
    return [tokens, *torch.autograd.grad(tokens.pow(3).mean(), [image, *weights])]


# --- against timm ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SIZES)
def test_every_size_equals_timm(name, tmp_path, record_property):
    theirs = awake(create_model(name, depth=1))
    ours = loaded(theirs, tmp_path / 'timm.pth', depth=1, **DINOV3 | SIZES[name])
    for h, w in GRIDS:
        image = torch.randn(1, 3, 16 * h, 16 * w)
        differences = [((a - b).abs().max() / b.abs().max()).item()
                       for a, b in zip(with_grads(ours, image), with_grads(theirs, image), strict=True)]
        record_property(f'{h}x{w}', max(differences))
        assert max(differences) < 1e-6, (h, w)


@pytest.mark.parametrize('changes', [{}, dict(qkv_bias=True), dict(swiglu_mlp=True, swiglu_align_to=8, mlp_ratio=2.7)],
                         ids=str)
def test_deep_ones_equal_timm(changes, tmp_path):
    theirs = narrow(depth=4, **changes)
    options = {key.removesuffix('_mlp'): value for key, value in changes.items()}
    ours = loaded(theirs, tmp_path / 'timm.pth', depth=4, norm_eps=1e-6, **options)
    for h, w in GRIDS:
        image = torch.randn(2, 3, 8 * h, 8 * w)
        for autocast in (False, True):
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                for a, b in zip(with_grads(ours, image), with_grads(theirs, image), strict=True):
                    assert (a - b).abs().max() <= 1e-6 * b.abs().max(), (h, w, autocast)


@pytest.mark.parametrize('kind', NAMES)
def test_every_attention_equals_the_one_in_timm(kind):
    theirs, ours = linearize(narrow(), kind), own(attention={'type': f'adala_mm.{kind}'}).eval()
    for block in theirs.blocks:
        for parameter in block.attn.parameters():  # convolutions and gates that start at 0 or 1 would not show
            nn.init.normal_(parameter, std=0.2)
    state = {key.replace('gamma_1', 'ls1.gamma').replace('gamma_2', 'ls2.gamma'): value
             for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    for h, w in ((4, 4), (3, 5)):
        image = torch.randn(2, 3, 8 * h, 8 * w)
        for a, b in zip(with_grads(ours, image), with_grads(theirs, image), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


# --- against complex numbers -----------------------------------------------------------------------------------------

def turned_by_hand(x: torch.Tensor, hw: tuple[int, int], num_prefix: int) -> torch.Tensor:
    """x (B, H, N, D) in float64: channels i and i + D / 2 are a complex number, and its angle grows."""
    out, (h, w), half = x.clone(), hw, x.shape[-1] // 2
    for place in range(h * w):
        y, z = divmod(place, w)
        for i in range(half):
            coordinate = (2 * y + 1) / h - 1 if i < half // 2 else (2 * z + 1) / w - 1
            angle = 2 * math.pi * coordinate / 100 ** (i % (half // 2) / (half // 2))
            pair = torch.complex(x[:, :, num_prefix + place, i], x[:, :, num_prefix + place, i + half])
            pair = pair * complex(math.cos(angle), math.sin(angle))
            out[:, :, num_prefix + place, i], out[:, :, num_prefix + place, i + half] = pair.real, pair.imag
    return out


@pytest.mark.parametrize('num_prefix', [0, 5])
@pytest.mark.parametrize('hw', [(3, 5), (1, 4)], ids=str)
@pytest.mark.parametrize('kind', NAMES)
@torch.no_grad()
def test_queries_and_keys_of_patches_are_turned(kind, hw, num_prefix):
    layer = build_attention({'type': kind}, 32, 4, grid=hw, num_prefix=num_prefix).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, num_prefix + hw[0] * hw[1], 32, dtype=torch.float64)
    found = layer(x, hw, num_prefix, RotaryPositions(8)(hw))
    plain = layer(x, hw, num_prefix)
    project = layer.project

    def by_hand(x):
        q, k, v = project(x)
        return turned_by_hand(q, hw, num_prefix), turned_by_hand(k, hw, num_prefix), v

    layer.project = by_hand
    if kind == 'LinearAttention':  # its short cut does not call `project`
        wanted = layer.proj(Attention.attend(layer, x, hw, num_prefix))
    else:
        wanted = layer(x, hw, num_prefix)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()
