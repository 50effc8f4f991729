"""Rotary positions and gated MLPs against timm's DINOv3, against complex numbers, and in every attention."""
from __future__ import annotations

import math

import pytest
import torch
from mmengine.config import Config
from timm import create_model
from timm.models.eva import Eva
from torch import nn

import adala_mm
from adala_mm import align, export, linearize
from adala_mm.export import graphs
from adala_mm.export.parity import shapes
from adala_mm.export.weights import export_timm
from adala_mm.models.attentions import Attention, LinearAttention, build_attention
from adala_mm.models.backbones.weights import positions_for
from adala_mm.ops import RotaryPositions, turn
from adala_mm.registry import ATTENTIONS, MODELS
from helpers import tiny_vit

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
    'vit_small_patch16_dinov3_qkvb': dict(embed_dim=384, num_heads=6, qkv_bias=True),
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


# --- in the network --------------------------------------------------------------------------------------------------

def softmax_file(path, **options) -> tuple[dict, nn.Module]:
    """A file of a softmax ViT with rotary positions, as ``init_cfg``, and the ViT."""
    model = awake(own(**options))
    torch.save(model.state_dict(), path)
    return dict(type='Pretrained', checkpoint=str(path)), model


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


@pytest.mark.parametrize(('target', 'attention', 'trainable'), [
    ('output', 'LinearAttention', None), ('heads', 'InLineAttention', 'qkv'),
    ('weights', 'HedgehogAttention', 'feature_map')])
def test_stage_1_turns_teacher_and_student(target, attention, trainable, tmp_path):
    init_cfg, teacher = softmax_file(tmp_path / 'softmax.pth')
    backbone = dict(tiny_vit(num_registers=4, layer_scale=1.0, qkv_bias=False, rotary=dict(rescale=2.0)),
                    attention=dict(type=f'adala_mm.{attention}'), trainable=trainable, init_cfg=init_cfg)
    model = MODELS.build(dict(type='adala_mm.AttentionAlignment', target=target, backbone=backbone)).train()
    model.init_weights()
    images = torch.randn(2, 3, 24, 40)
    found = model(images, mode='loss')
    found['loss'].backward()
    with torch.no_grad():
        x, hw = teacher.embed(images)
        layout, losses = teacher.layout(x, hw), []  # the stream is not disturbed
        assert len(layout) == 3
        for block, student in zip(teacher.blocks, model.backbone.blocks, strict=True):
            h = block.norm1(x)
            if target == 'weights':
                (q, k, _), (wanted_q, wanted_k, _) = (a.turned(h, *layout) for a in (student.attn, block.attn))
                wanted = (wanted_q @ wanted_k.mT / 8 ** 0.5).softmax(-1)
                losses.append(-(wanted * student.attn.weights(q, k).log()).sum(-1).mean())
            else:
                got, wanted = ((a if target == 'output' else a.attend)(h, *layout)
                               for a in (student.attn, block.attn))
                losses.append((got - wanted).square().mean())
            x = block(x, *layout)
        torch.testing.assert_close(found['loss'], torch.stack(losses).mean())
        torch.testing.assert_close(model.teacher_features(images), teacher.forward_features(images))


def test_stage_2_with_the_loss_of_stage_1(tmp_path):
    init_cfg, teacher = softmax_file(tmp_path / 'softmax.pth')
    backbone = dict(tiny_vit(num_registers=4, layer_scale=1.0, qkv_bias=False, rotary=dict()), init_cfg=init_cfg)
    model = MODELS.build(dict(type='adala_mm.FeatureAlignment', teacher=backbone, attention_weight=1.0, backbone=dict(
        backbone, attention=dict(type='adala_mm.WindowAttention', window_size=9))))  # a window of all is softmax
    model.init_weights()
    losses = model.train()(torch.randn(2, 3, 24, 40), mode='loss')
    assert losses['loss'].item() < 1e-10 and losses['attention_mse'].item() < 1e-10


def a_window_of_all(rotary: dict, path) -> tuple[dict, dict]:
    """Configs of a teacher and of a student that is its teacher by another name."""
    init_cfg, _ = softmax_file(path)
    teacher = dict(tiny_vit(num_registers=4, layer_scale=1.0, qkv_bias=False, rotary=rotary), init_cfg=init_cfg)
    return teacher, dict(teacher, attention=dict(type='adala_mm.WindowAttention', window_size=9))


DISTURBED = dict(shift=0.5, jitter=2.0, rescale=2.0)


def test_positions_stay_where_they_are_in_feature_alignment(tmp_path):
    teacher, student = a_window_of_all(DISTURBED, tmp_path / 'softmax.pth')
    model = MODELS.build(dict(type='adala_mm.FeatureAlignment', teacher=teacher, backbone=student))
    model.init_weights()
    model.eval()
    assert model.train()(torch.randn(2, 3, 24, 40), mode='loss')['rel_error'] < 1e-5
    assert model.backbone.training and model.backbone.blocks.training


def test_positions_stay_where_they_are_in_the_alignment_of_a_task_model(tmp_path):
    teacher, student = a_window_of_all(DISTURBED, tmp_path / 'softmax.pth')
    whole, path = MODELS.build(dict(type='mmpretrain.ImageClassifier', backbone=teacher)), tmp_path / 'model.pth'
    whole.backbone.init_weights()
    torch.save(whole.state_dict(), path)
    model = MODELS.build(dict(type='adala_mm.TaskModelAlignment', task_model='mmpretrain.ImageClassifier',
                              teacher=dict(type='Pretrained', checkpoint=str(path)), backbone=student))
    model.init_weights()
    assert model.train()(torch.randn(2, 3, 24, 40), mode='loss')['rel_error'] < 1e-5


@pytest.mark.parametrize('make', [lambda: own(rotary=DISTURBED), lambda: narrow(
    **{f'rope_{name}_coords': value for name, value in DISTURBED.items()})], ids=['ours', 'timm'])
def test_positions_stay_where_they_are_in_align(make):
    teacher, images = awake(make()), torch.randn(2, 3, 24, 40)
    student = linearize(teacher, dict(type='adala_mm.WindowAttention', window_size=9)).train()
    with torch.no_grad():
        assert not torch.allclose(student.forward_features(images), teacher.forward_features(images), rtol=0.1)
    for stage in (1, 2):
        (record,) = align(student, teacher, [images], stage=stage, steps=1, lr=1e-12)
        assert record['rel_error'] < 1e-5 and all(module.training for module in student.modules()), stage


@pytest.mark.parametrize('stage', [1, 2])
def test_align_save_and_load(stage, tmp_path):
    teacher = awake(own(swiglu=True, mlp_ratio=2.7, rotary=dict(base=50.0, rescale=2.0)))
    student = linearize(teacher)
    first, last = (line['rel_error'] for line in align(student, teacher, [torch.randn(2, 3, 24, 40)], stage=stage,
                                                       steps=8, lr=1e-3, log_interval=4))
    assert last < first
    adala_mm.save(student, tmp_path / 'student.safetensors')
    twin, images = adala_mm.load(tmp_path / 'student.safetensors').eval(), torch.randn(2, 3, 40, 24)
    assert torch.equal(twin.forward_features(images), student.eval().forward_features(images))
    assert all(getattr(twin.rotary, name) == getattr(teacher.rotary, name) for name in ('base', 'rescale', 'shift'))


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


def test_other_files_are_named(tmp_path):
    init_cfg, _ = softmax_file(tmp_path / 'rotary.pth')
    with pytest.raises(ValueError, match=r'(?s)missing +pos_embed +- +\(1, 21, 32\).*say rotary=dict\(\)'):
        own(rotary=None, init_cfg=init_cfg).init_weights()
    init_cfg, _ = softmax_file(tmp_path / 'plain.pth', rotary=None)
    for options in ({}, dict(num_registers=2)):  # the grid of positions that are not wanted is no matter
        with pytest.raises(ValueError, match=r'(?s)unexpected +pos_embed +\(1, 21, 32\).*: leave out rotary'):
            own(init_cfg=init_cfg, **options).init_weights()
    init_cfg, _ = softmax_file(tmp_path / 'small.pth')
    own(img_size=48, init_cfg=init_cfg).init_weights()  # of any size
    with pytest.raises(ValueError, match=r'init_cfg\.grid=\(4, 4\) .* rotary positions.*leave it out'):
        own(init_cfg=dict(init_cfg, grid=(4, 4))).init_weights()


@pytest.mark.parametrize(('changes', 'options'), [
    (dict(num_reg_tokens=0), dict(num_registers=0)), (dict(num_reg_tokens=1, class_token=False), dict(num_registers=1)),
    (dict(num_reg_tokens=0, use_abs_pos_emb=True), dict(num_registers=0, rotary=None))], ids=str)
def test_names_of_other_rotary_vits_of_timm_are_not_taken_for_dinov3(changes, options, tmp_path):
    theirs = narrow(**changes, rope_type='cat', rope_rotate_half=False)
    with pytest.raises(ValueError, match=r'(?s)does not fit this ViT.*unexpected +blocks\.\*\.gamma_1'):
        loaded(theirs, tmp_path / 'timm.pth', class_token=changes.get('class_token', True), **options)


@pytest.mark.parametrize('path', ['timm://vit_pe_core_tiny_patch16_384', 'pe.pth', 'timm://vit_small_patch16_rope_224'])
def test_rotary_positions_that_no_weight_shows_are_refused(path, tmp_path, monkeypatch):
    theirs, local = create_model('vit_pe_core_tiny_patch16_384', depth=2), tmp_path / 'pe.pth'
    state = theirs.state_dict()
    torch.save(state if path == 'pe.pth' else {key: state[key] for key in state if 'attn_pool' not in key}, local)
    monkeypatch.setattr('adala_mm.utils.checkpoint.local_file', lambda path: local)
    model = own(img_size=384, patch_size=16, embed_dim=192, num_heads=3, num_registers=0, layer_scale=None,
                pre_norm=True, qkv_bias=True, rotary=None, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(ValueError, match="rotary positions .*of another kind than DINOv3's.*linearize"):
        model.init_weights()


def test_a_whole_model_of_another_size():
    small, large = (nn.ModuleDict(dict(backbone=own(img_size=size))) for size in (32, 48))
    state = small.state_dict()
    fitted = positions_for(large, state)
    assert fitted.keys() == state.keys()
    large.load_state_dict(fitted)


def test_biases_of_the_file(tmp_path):
    """Zeros are left out of a ViT without biases; others are an error, and a ViT with biases wants some."""
    theirs, path = narrow(qkv_bias=True), tmp_path / 'timm.pth'
    torch.save(theirs.state_dict(), path)
    with pytest.raises(ValueError, match=r'unexpected +blocks\.\*\.attn\.qkv\.bias +\(x 2\)'):
        own(init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()
    for block in theirs.blocks:
        nn.init.zeros_(block.attn.q_bias)
        nn.init.zeros_(block.attn.v_bias)
    model, images = loaded(theirs, path, norm_eps=1e-6), torch.randn(1, 3, 24, 40)
    torch.testing.assert_close(model.forward_features(images), theirs.forward_features(images), rtol=1e-6, atol=1e-6)
    torch.save(narrow().state_dict(), path)
    with pytest.raises(ValueError, match=r'missing +blocks\.\*\.attn\.qkv\.bias +\(x 2\)'):
        own(qkv_bias=True, init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()


@pytest.mark.parametrize(('key', 'library'), [('storage_tokens', 'official DINOv3'),
                                              ('embeddings.register_tokens', 'transformers')])
def test_names_of_other_libraries_ask_for_the_converter(key, library, tmp_path):
    path = tmp_path / 'theirs.pth'
    torch.save({key: torch.ones(1, 4, 32), 'mask_token': torch.ones(1, 32), 'blocks.0.ls1.gamma': torch.ones(32)}, path)
    with pytest.raises(ValueError, match=f'holds weights of {library}.*convert_vfm.py'):
        own(init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()


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
