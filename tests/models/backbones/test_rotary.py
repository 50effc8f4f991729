"""Rotary positions and gated MLPs against timm's DINOv3, against complex numbers, and in every attention."""
from __future__ import annotations

import math

import pytest
import torch
from mmengine.config import Config
from timm import create_model
from torch import nn

from adala_mm import export, linearize
from adala_mm.export import graphs
from adala_mm.export.parity import shapes
from adala_mm.export.weights import export_timm
from adala_mm.models.attentions import Attention, LinearAttention, build_attention
from adala_mm.ops import RotaryPositions
from adala_mm.registry import ATTENTIONS, MODELS
from helpers import tiny_vit
from helpers.rotary import awake, loaded, narrow, own

ATTENTIONS.import_from_location()
NAMES = sorted(ATTENTIONS.module_dict)
GRIDS = ((4, 4), (5, 3), (2, 9), (11, 7))
# timm's name of each published size: what `AdaLAViT` is told beside what all have.
SIZES = {
    'vit_small_patch16_dinov3': dict(embed_dim=384, num_heads=6),
    'vit_small_plus_patch16_dinov3': dict(embed_dim=384, num_heads=6, swiglu=True),
    'vit_base_patch16_dinov3': dict(embed_dim=768, num_heads=12),
    'vit_large_patch16_dinov3': dict(embed_dim=1024, num_heads=16),
    'vit_huge_plus_patch16_dinov3': dict(embed_dim=1280, num_heads=20, swiglu=True),
    'vit_small_patch16_dinov3_qkvb': dict(embed_dim=384, num_heads=6, qkv_bias=True),
}
DINOV3 = dict(img_size=256, patch_size=16, num_registers=4, layer_scale=1e-5, norm_eps=1e-5, qkv_bias=False,
              rotary=dict())


def with_grads(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """Features, and gradients of the image and of the first block's projections."""
    image = image.clone().requires_grad_()
    tokens = model.forward_features(image)
    weights = [model.blocks[0].attn.qkv.weight, model.blocks[0].mlp.fc2.weight, model.reg_token]
    return [tokens, *torch.autograd.grad(tokens.pow(3).mean(), [image, *weights])]


# --- against timm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', SIZES)
def test_every_size_equals_timm(name, tmp_path):
    theirs = awake(create_model(name, depth=1))
    ours = loaded(theirs, tmp_path / 'timm.pth', depth=1, **DINOV3 | SIZES[name])
    for h, w in GRIDS[:2]:
        image = torch.randn(1, 3, 16 * h, 16 * w)
        differences = [((a - b).abs().max() / b.abs().max()).item()
                       for a, b in zip(with_grads(ours, image), with_grads(theirs, image), strict=True)]
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


@pytest.mark.parametrize(('kind', 'invariant'), [('SoftmaxAttention', True), ('MLLAAttention', False),
                                                 ('LinearAttention', False), ('HedgehogAttention', False)])
def test_only_softmax_depends_on_differences_of_places_alone(kind, invariant):
    """All places of an image moved alike, by a quarter of its side."""
    torch.manual_seed(0)
    layer, positions, x = build_attention({'type': kind}, 64, 1), RotaryPositions(64), torch.randn(2, 16 * 16, 64)
    nn.init.normal_(layer.qkv.weight, std=0.25)
    layer.proj = layer.proj if kind == 'MLLAAttention' else nn.Identity()  # which asks it for the width
    here, there = positions((16, 16)), RotaryPositions(64)
    there.disturbed = lambda axes: [axis + 0.5 for axis in axes]
    with torch.no_grad():
        wanted, found = (layer(x, (16, 16), 0, rotation) for rotation in (here, there((16, 16))))
    moved = ((found - wanted).norm() / wanted.norm()).item()
    assert moved < 1e-5 if invariant else moved > 0.05, moved


class OwnAttend(Attention):
    """A gate of one's own, written without rotary positions in mind."""

    def attend(self, x, hw, num_prefix):
        return x


class OwnMix(Attention):
    def mix(self, q, k, v, hw, num_prefix):
        return q + k + v


def test_layers_that_would_leave_positions_out_are_refused():
    message = r'OwnAttend\.attend takes no rotation.*rotation=None.*turned\(x, hw, num_prefix, rotation\)'
    with pytest.raises(TypeError, match=message):
        own(attention=dict(type=OwnAttend))
    for model in (own(), narrow()):
        with pytest.raises(TypeError, match=message):
            linearize(model, OwnAttend)
        assert linearize(model, OwnMix).num_linear_blocks == 2
    for model in (MODELS.build(tiny_vit()), narrow(use_rot_pos_emb=False, use_abs_pos_emb=True)):
        assert linearize(model, OwnAttend).num_linear_blocks == 2


class OwnForward(ATTENTIONS.get('LoLCATSAttention')):
    """Both methods without rotary positions in mind, around a layer that does have them in mind."""

    def attend(self, x, hw, num_prefix):
        return super().attend(x, hw, num_prefix)

    def forward(self, x, hw, num_prefix):
        return super().forward(x, hw, num_prefix)


@torch.no_grad()
@pytest.mark.parametrize('base', NAMES)
def test_layers_that_take_no_rotation_run_without(base):
    attend = ATTENTIONS.get(base).attend
    kind = type('Old', (ATTENTIONS.get(base),), {
        'attend': lambda self, x, hw, num_prefix: 2 * attend(self, x, hw, num_prefix)})
    layers = [build_attention({'type': layer}, 32, 4, grid=(3, 5), num_prefix=1).eval() for layer in (kind, base)]
    layers[0].load_state_dict(layers[1].state_dict(), strict=False)
    old, plain = layers
    x = torch.randn(2, 16, 32)
    torch.testing.assert_close(old.attend(x, (3, 5), 1), 2 * plain.attend(x, (3, 5), 1))
    assert old(x, (3, 5), 1).shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize('kind', [OwnAttend, OwnForward])
def test_vits_without_rotary_positions_take_layers_that_know_none(kind):
    image = torch.randn(2, 3, 24, 40)
    for model in (awake(MODELS.build(tiny_vit())), narrow(use_rot_pos_emb=False, use_abs_pos_emb=True)):
        student = linearize(model, kind)
        assert student.forward_features(image).shape == model.forward_features(image).shape
    assert MODELS.build(tiny_vit(attention=dict(type=kind)))(image)[0].isfinite().all()


class Doubled(LinearAttention):
    def attend(self, x, *layout):
        return 2 * super().attend(x, *layout)

    def forward(self, x, hw, num_prefix, *rotation):
        return super().forward(x, hw, num_prefix, *rotation)


@torch.no_grad()
def test_layers_that_hand_on_all_that_they_are_told_turn():
    layer = build_attention({'type': Doubled}, 32, 4)
    plain = build_attention({'type': 'LinearAttention'}, 32, 4)
    plain.load_state_dict(layer.state_dict())
    for proj in (layer.proj, plain.proj):
        nn.init.zeros_(proj.bias)
    x, rotation = torch.randn(2, 16, 32), RotaryPositions(8)((3, 5))
    torch.testing.assert_close(layer(x, (3, 5), 1, rotation), 2 * plain(x, (3, 5), 1, rotation))
    own(attention=dict(type=Doubled))
    linearize(narrow(), Doubled)


def test_what_is_recomputed_is_turned_alike():
    disturbed, images, grads = dict(shift=0.2, jitter=1.2, rescale=2.0), torch.randn(2, 3, 24, 40), []
    plain = awake(own(rotary=disturbed, attention=dict(type='adala_mm.LinearAttention')))
    for with_cp in (False, True):
        model = own(rotary=disturbed, attention=dict(type='adala_mm.LinearAttention'), with_cp=with_cp).train()
        model.load_state_dict(plain.state_dict())
        torch.manual_seed(0)
        sizes = images, images.mT
        sum(model(image)[0].square().sum() for image in sizes).backward()  # two sizes before one backward pass
        grads.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_queries_of_an_encoder_only_head_do_not_turn():
    model = awake(own(type='adala_mm.QueryViT', num_queries=3, query_blocks=1))
    image = torch.randn(2, 3, 24, 40)
    x, hw = model.embed(image)
    rotation = RotaryPositions(8)(hw)
    x = torch.cat([model.query_embed.weight.expand(2, -1, -1), model.blocks[0](x, hw, 5, rotation)], dim=1)
    wanted = model.norm(model.blocks[1](x, hw, 8, rotation))
    patches, queries = model(image)
    torch.testing.assert_close(queries, wanted[:, :3])
    torch.testing.assert_close(patches.flatten(2).mT, wanted[:, 8:])


def test_blocks_compile_in_one_piece():
    model = awake(own(attention=dict(type='adala_mm.LinearAttention')))
    images = torch.randn(2, 3, 24, 40)
    wanted = model(images)[0]
    for block in model.blocks:
        block.compile(backend='eager', fullgraph=True)
    torch.testing.assert_close(model(images)[0], wanted)


def test_graphs_hold_for_other_sizes(tmp_path):
    backbone = tiny_vit(num_registers=4, layer_scale=1.0, qkv_bias=False, rotary=dict(),
                        attention=dict(type='adala_mm.LinearAttention'))
    target = export.assemble(Config(dict(default_scope='mmseg', model=dict(type='adala_mm.FeatureAlignment',
                                                                            backbone=backbone))), 'backbone')
    awake(target.model)
    run = graphs.export_torch(target, tmp_path / 'vit.pt2')
    export.check(export.differences(target.module, run, shapes(target.size, target.multiple, True)), 1e-4)


@pytest.mark.parametrize('options', [{}, dict(rotary=None, swiglu=True)], ids=str)
def test_libraries_that_have_no_such_vit(options, tmp_path):
    backbone = tiny_vit(**dict(num_registers=4, layer_scale=1.0, rotary=dict()) | options)
    target = export.assemble(Config(dict(default_scope='mmseg', model=dict(type='adala_mm.FeatureAlignment',
                                                                            backbone=backbone))), 'backbone')
    with pytest.raises(ValueError, match=r'rotary positions and gated MLPs.*\.onnx and \.pt2'):
        export_timm(target, tmp_path / 'vit.safetensors')
