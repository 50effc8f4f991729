"""What `linearize` makes against the models it takes apart, `AdaLAViT`, and softmax replaced in float64."""
from __future__ import annotations

import copy
import inspect
import io
import logging
import re
import subprocess
import sys

import pytest
import torch
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn import functional as F

from adala_mm import linearize
from adala_mm.adapters import Adapter
from adala_mm.linearization import advised
from adala_mm.models.attentions import LinearAttention
from adala_mm.registry import ATTENTIONS
from helpers import LINEAR, ROOT
from helpers.vits import (
    HF,
    SIZES,
    TIMM,
    MeanAttention,
    attentions,
    awaken,
    build,
    every_family,
    headless,
    hf_vit,
    own_vit,
    run,
    timm_vit,
)

ATTENTIONS.import_from_location()


def quadratic(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs) -> torch.Tensor:
    """Linear attention by its whole matrix, in the place of `scaled_dot_product_attention`."""
    assert attn_mask is None and not dropout_p and not is_causal
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


# --- linearize: what it computes --------------------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_keeping_all_softmax_changes_nothing(family):
    model, images = build(family), torch.randn(2, 3, *SIZES[1])
    kept = linearize(model, keep_softmax=range(3))
    assert kept.num_linear_blocks == 0 and kept.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(run(kept, images), run(model, images))


@every_family
@torch.no_grad()
def test_everything_around_the_softmax_is_the_models_own(family):
    """With softmax mixing inside the adapters, the outputs are those of the original."""
    model = build(family)
    replaced = linearize(model, 'softmax')
    assert replaced.num_linear_blocks == 0 and len(attentions(replaced)) == 3
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(run(replaced, images), run(model, images), rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize('size', SIZES, ids=str)
@torch.no_grad()
def test_linear_is_the_original_with_another_formula(family, size, monkeypatch):
    model, images = build(family).double(), torch.randn(2, 3, *size, dtype=torch.float64)
    softmax = run(model, images)
    linear = run(linearize(model), images)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', quadratic)
    for module in model.modules():
        if hasattr(module, 'scaled_dot_product_attention'):  # mmpretrain took it when it was built
            module.scaled_dot_product_attention = quadratic
    wanted = run(model, images)
    torch.testing.assert_close(linear, wanted, rtol=1e-9, atol=1e-9)
    assert (linear - softmax).abs().max() > 0.05


@pytest.mark.parametrize('name', [name for name, (_, ours) in TIMM.items() if ours is not None])
@torch.no_grad()
def test_linear_timm_equals_our_vit(name):
    model, ours = linearize(build(name)), own_vit(name)
    ours.load_state_dict(headless(model.state_dict()))
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(model.forward_features(images), ours.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', sorted(ATTENTIONS.module_dict))
def test_every_attention_in_timm_equals_our_vit(kind):
    """Keys included: what the attention adds has the same names in both."""
    model, ours = linearize(build('dinov2_reg4'), kind), own_vit('dinov2_reg4', {'type': f'adala_mm.{kind}'})
    for attn in attentions(model):
        for parameter in attn.parameters():  # convolutions and gates that start at 0 or 1 would not show
            nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(headless(model.state_dict()))
    images = torch.randn(2, 3, *SIZES[1], requires_grad=True)
    output = model.forward_features(images)
    torch.testing.assert_close(output, ours.forward_features(images), rtol=1e-4, atol=1e-4)
    output.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if '.attn.' in name and 'redraw' not in name}
    assert images.grad.isfinite().all() and all(g is None or g.isfinite().all() for g in grads.values())
    assert grads['blocks.0.attn.qkv.weight'].abs().max() > 0


@pytest.mark.parametrize('family', ['dinov3', 'eva02', 'mixed', 'hf_dinov2_with_registers', 'hf_dinov3', 'hf_siglip',
                                    'mmpretrain'])
@pytest.mark.parametrize('kind', ['rala', 'inline', 'polaformer', 'vicinity', 'vig', 'lolcats', 'linformer'])
def test_attentions_with_parts_of_their_own_elsewhere(family, kind):
    model = linearize(build(family), kind)
    output = run(model, torch.randn(2, 3, *SIZES[1]))
    output.square().mean().backward()
    new = [p for attn in attentions(model) for name, p in attn.named_parameters()]
    assert output.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in new)
    assert model.num_linear_blocks == 3


@pytest.mark.parametrize('family', ['qk_norm', 'dinov3', 'eva02', 'eva', 'hf_clip', 'hf_dinov3', 'mmpretrain'])
@torch.no_grad()
def test_layers_that_project_in_their_own_way(family):
    """LoRA's updates start at zero: LoLCATS is at first Hedgehog, norms, biases and rotations included."""
    model, images = build(family), torch.randn(2, 3, *SIZES[1])
    torch.testing.assert_close(run(linearize(model, 'lolcats'), images), run(linearize(model, 'hedgehog'), images))


@pytest.mark.parametrize('family', ['dinov3', 'hf_dinov3'])
@torch.no_grad()
def test_windows_that_reach_over_the_edge_with_rotary_positions(family):
    """One window around the whole grid is softmax attention, however much of it is padding."""
    model, images = build(family), torch.randn(1, 3, 24, 40)
    torch.testing.assert_close(run(linearize(model, dict(type='window', window_size=7)), images), run(model, images),
                               rtol=1e-4, atol=1e-4)


# --- linearize: what it does to a model -------------------------------------------------------------------------------


@every_family
def test_state_dict_of_the_original_loads(family):
    model = build(family)
    linearize(copy.deepcopy(model), inplace=True).load_state_dict(model.state_dict())
    gated = linearize(model, 'rala')
    missing, unexpected = gated.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and missing and all(key.split('.')[-2] in ('gate', 'lepe') for key in missing)


def test_copy_and_inplace():
    model, images = build('augreg'), torch.randn(1, 3, 32, 32)
    before = model(images)
    other = linearize(model)
    assert other is not model and not attentions(model) and torch.equal(model(images), before)
    other.blocks[0].attn.qkv.weight.data.zero_()
    assert torch.equal(model(images), before)
    assert linearize(model, inplace=True) is model and len(attentions(model)) == 3
    assert not torch.allclose(model(images), before)


@pytest.mark.parametrize('family', ['qk_norm', 'dinov3', 'hf_siglip', 'hf_dinov3', 'mmpretrain'])
@torch.no_grad()
def test_copies_and_pickles(family):
    model, file = linearize(build(family), 'polaformer'), io.BytesIO()
    images, other = torch.randn(2, 3, *SIZES[1]), torch.randn(1, 3, *SIZES[0])
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        wanted = run(model, images)
        run(twin, other)  # a grid of its own, not that of the model it came from
        assert torch.equal(run(model, images), wanted) and torch.equal(run(twin, images), wanted)


def test_blocks_to_keep_and_a_second_call(caplog):
    caplog.set_level(logging.INFO, 'adala_mm')
    model = linearize(timm_vit(depth=5), 'hedgehog', keep_softmax=(0, -2))
    assert [isinstance(block.attn, Adapter) for block in model.blocks] == [False, True, True, False, True]
    assert model.num_linear_blocks == 3 and 'VisionTransformer: 3 of 5 blocks linear' in caplog.messages
    model = linearize(model, LinearAttention, keep_softmax=[3], inplace=True)
    kinds = [type(block.attn).__name__ for block in model.blocks]
    assert kinds == ['TimmLinearAttention', *['TimmHedgehogAttention'] * 2, 'Attention', 'TimmHedgehogAttention']
    assert model.num_linear_blocks == 4 and len(model.patch_embed.proj._forward_hooks) == 1
    assert model(torch.randn(1, 3, 24, 40)).isfinite().all()
    assert linearize(model).num_linear_blocks == 5
    with pytest.raises(ValueError, match='nothing to replace'):
        linearize(linearize(model))


@pytest.mark.parametrize('attention', ['LINEAR', 'LinearAttention', 'adala_mm.LinearAttention', LinearAttention,
                                       {'type': 'linear', 'feature_map': 'relu'}, LINEAR | {'feature_map': 'relu'}],
                         ids=str)
def test_ways_to_name_an_attention(attention):
    layers = attentions(linearize(timm_vit(), attention))
    assert all(isinstance(layer, LinearAttention) for layer in layers)
    assert layers[0].feature_map == ('relu' if isinstance(attention, dict) else 'elu1')


@pytest.mark.parametrize('name', ['coarsetofine', 'coarse_to_fine', 'Coarse-to-Fine', 'windowed_linear', 'monarch'])
def test_words_of_a_name_may_be_apart(name):
    wanted = re.sub('[_-]', '', name).lower()
    kinds = {type(layer).__name__.lower() for layer in attentions(linearize(timm_vit(), name))}
    assert kinds == {f'timm{wanted}attention'}


@every_family
@torch.no_grad()
def test_auto_takes_the_advice_for_the_image_size(family, caplog):
    """A grid of 4 x 4 has 4 tiles of 2 x 2 patches: all are open, and that is softmax."""
    caplog.set_level(logging.INFO, 'adala_mm')
    model, images = build(family), torch.randn(2, 3, *SIZES[0])
    small, large = linearize(model, 'auto'), linearize(model, dict(type='auto', grid=(32, 48)))
    torch.testing.assert_close(run(small, images), run(model, images), rtol=1e-4, atol=1e-4)
    for other, options in ((small, (2, 4, 16)), (large, (4, 8, 16))):
        assert other.num_linear_blocks == 3 and run(other, torch.randn(1, 3, *SIZES[1])).isfinite().all()
        assert {(layer.tile, layer.block, layer.num_open) for layer in attentions(other)} == {options}
    said = [message for message in caplog.messages if message.startswith('auto: CoarseToFineAttention with ')]
    assert [re.search(r'for (\d+ x \d+) patches', message)[1] for message in said] == ['4 x 4', '32 x 48']
    assert ['faster' in message for message in said] == [True, False]


def test_where_the_advice_changes():
    small, large = (dict(type='CoarseToFineAttention', tile=tile, num_open=num_open, block=2 * tile)
                    for tile, num_open in ((2, 16), (4, 16)))
    assert [advised(grid) for grid in ((14, 14), (31, 32), (32, 32), (24, 48), (128, 128))] == [
        small, small, large, large, large]


@torch.no_grad()
def test_an_attention_of_the_users_own():
    model, images = build('augreg'), torch.randn(2, 3, 32, 32)
    for attention in (MeanAttention, f'{__name__}.MeanAttention'):
        assert run(linearize(model, attention), images).isfinite().all()


@torch.no_grad()
def test_inside_another_model():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = build('augreg'), nn.Linear(32, 2)

        def forward(self, images):
            return self.head(self.backbone.forward_features(images))

    model = Segmenter()
    other, images = linearize(model), torch.randn(1, 3, 24, 40)
    assert other.num_linear_blocks == 3 and isinstance(other, Segmenter)
    torch.testing.assert_close(other(images), other.head(linearize(model.backbone).forward_features(images)))


def test_transformers_call_signatures():
    for name in HF:
        model = linearize(build(name), keep_softmax=[0])
        images = torch.randn(1, 3, 32, 32)
        output = model(pixel_values=images, output_hidden_states=True)
        assert len(output.hidden_states) == 4
        if name != 'hf_backbone':
            assert output.pooler_output.shape == (1, 32)
            assert torch.equal(model(images, return_dict=False)[0], output.last_hidden_state)
        with pytest.raises(ValueError, match='output_attentions needs attention weights'):
            model(pixel_values=images, output_attentions=True)
    model, images = linearize(hf_vit('hf_dinov2', attn_implementation='eager')), torch.randn(1, 3, 32, 32)
    assert model(images).last_hidden_state.isfinite().all()
    masks = [dict(attention_mask=torch.ones(1, 17).tril(3))]
    if 'head_mask' in inspect.signature(model.forward).parameters:  # transformers 4
        masks.append(dict(head_mask=torch.ones(4)))
    for mask in masks:
        with pytest.raises(ValueError, match=f'{next(iter(mask))} needs attention weights'):
            model(images, **mask)
    model.config.output_attentions = True
    for asked in ({}, dict(output_attentions=None)):
        with pytest.raises(ValueError, match='output_attentions needs attention weights'):
            model(images, **asked)


def test_timm_methods_and_checkpointing():
    model, images = linearize(build('dinov2_reg4'), 'rala'), torch.randn(2, 3, *SIZES[1])
    maps = model.forward_intermediates(images, indices=2, intermediates_only=True)
    assert [m.shape for m in maps] == [(2, 32, 3, 5)] * 2
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.train()(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.blocks.parameters()])
    torch.testing.assert_close(*grads)
    for option in (dict(attn_mask=torch.ones(20, 20) > 0), dict(is_causal=True)):
        with pytest.raises(ValueError, match=f'{next(iter(option))} needs attention weights.*keep softmax'):
            model(images, **option)


def repeat_calls(model: nn.Module) -> None:
    if hasattr(model, 'gradient_checkpointing_enable'):
        model.gradient_checkpointing_enable()  # reentrant
    elif hasattr(model, 'set_grad_checkpointing'):
        model.set_grad_checkpointing()
    else:
        apply_activation_checkpointing(model, check_fn=lambda part: type(part).__name__ == 'TransformerEncoderLayer')


def repeat_forwards(model: nn.Module) -> None:
    turn_on_activation_checkpointing(model, [f'blocks.{i}' for i in range(3)])


def gradients(model: nn.Module, *sizes: tuple[int, int]) -> torch.Tensor:
    """Of one loss of images of several sizes; the images learn too, as a reentrant repetition needs."""
    generator = torch.Generator().manual_seed(7)
    images = [torch.randn(2, 3, *size, generator=generator).requires_grad_() for size in sizes]
    model.zero_grad()
    sum(run(model, batch).square().mean() for batch in images).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


EQUAL = (16, 32), (32, 16), (8, 64), (16, 32)  # as many patches


@pytest.mark.parametrize('family', ['augreg', 'dinov3', 'hf_vit', 'hf_dinov2', 'hf_dinov3', 'hf_clip', 'mmpretrain'])
def test_checkpointing_with_images_of_several_sizes(family):
    """Blocks are repeated when the patch embedding has seen other images, with their own grids nevertheless."""
    model = linearize(build(family), 'rmt')
    model.train()
    repeated = copy.deepcopy(model)
    repeat_calls(repeated)
    for sizes in (SIZES, EQUAL):
        assert torch.equal(gradients(repeated, *sizes), gradients(model, *sizes))


def test_checkpointing_that_does_not_repeat_calls():
    """Grids are told apart by their number of patches, where that can be: else there is an error, and no guess."""
    model = linearize(build('augreg'), 'rmt').train()
    repeated = copy.deepcopy(model)
    repeat_forwards(repeated)
    for sizes in (SIZES, *([size] for size in EQUAL)):  # none of the sizes of a backward pass before counts
        assert torch.equal(gradients(repeated, *sizes), gradients(model, *sizes))
    with pytest.raises(ValueError, match='repeats a block of 9 tokens, of images with 1 x 8 or 2 x 4 or 4 x 2 patches'):
        gradients(repeated, *EQUAL)


def test_copies_between_forward_and_backward():
    """The grids that wait for a backward pass stay with their own model."""
    model, images = linearize(build('augreg'), 'rmt').train(), torch.randn(1, 3, *SIZES[1])
    loss = run(model, images).square().mean()
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert not attentions(twin)[0].layout.kept and torch.equal(run(twin, images).square().mean(), loss)
    assert len(attentions(model)[0].layout.kept) == 3


def test_compiles_in_one_piece():
    images = torch.randn(2, 3, *SIZES[1])
    model = linearize(build('dinov3'))
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


def test_missing_patches_are_noticed():
    model = linearize(timm_vit(patch_drop_rate=0.5)).train()
    with pytest.raises(ValueError, match='9 tokens.*grid of .4, 4.*no patch dropout'):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match='17 tokens.*grid of None'):
        linearize(timm_vit()).blocks(torch.randn(1, 17, 32))


class Sum(nn.Linear):
    pass


def two_vits() -> nn.Module:
    return nn.ModuleList([timm_vit(), timm_vit()])


@pytest.mark.parametrize(('model', 'options', 'error', 'message'), [
    (lambda: Sum(2, 2), {}, TypeError, 'Sum holds no ViTs.*timm Visi.*Dinov2Model.*mmpretrain.*AdaLAViT'),
    (two_vits, {}, TypeError, 'holds 2 ViTs.*pass one'),
    (lambda: timm_vit(attn_layer='diff'), {}, TypeError, 'block 0 has DiffAttention where Attention is supported'),
    (lambda: timm_vit(block_fn=parallel()), {}, TypeError, 'block 0 has no attn'),
    (lambda: timm_vit(attn_drop_rate=0.1), {}, ValueError, r'attn_drop=0\.1.*set this dropout to 0'),
    (lambda: hf_vit('hf_clip', attention_dropout=0.1), {}, ValueError, r'CLIPAttention drops.*dropout=0\.1'),
    (timm_vit, dict(attention='hedgehogs'), ValueError, "unknown attention type 'hedgehogs'.*Registered"),
    (timm_vit, dict(attention=dict(type='auto', grid=None)), ValueError, r"that is None: say which.*grid=\(32, 32\)"),
    (timm_vit, dict(attention=dict(type='auto', grid=1024)), ValueError, 'that is 1024: say which'),
    (timm_vit, dict(attention=dict(type='auto', gird=(4, 4))), TypeError, 'gird'),
    (timm_vit, dict(attention=nn.Linear), ValueError, 'unknown attention type.*Linear'),
    (timm_vit, dict(attention={'feature_map': 'relu'}), ValueError, 'unknown attention type None'),
    (timm_vit, dict(attention={'type': 'linear', 'featuremap': 'relu'}), TypeError, 'featuremap'),
    (timm_vit, dict(keep_softmax=[3]), ValueError, 'no block 3 in a ViT of 3 blocks'),
    (timm_vit, dict(keep_softmax=[0, -4]), ValueError, 'no block -4'),
])
def test_wrong_arguments(model, options, error, message):
    model = model()
    before = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        linearize(model, **options, inplace=True)
    assert [type(module) for module in model.modules()] == before


def parallel():
    from timm.models.vision_transformer import ParallelScalingBlock
    return ParallelScalingBlock


def test_names_that_clash():
    model = timm_vit()
    for block in model.blocks:
        block.attn.gate = nn.Linear(32, 32)
    with pytest.raises(TypeError, match='RALAAttention and Attention both have gate'):
        linearize(model, 'rala')
    awaken(model)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(linearize(model, 'softmax')(images), model(images), rtol=1e-4, atol=1e-4)


def test_precision_and_device_follow_the_model():
    model = linearize(build('augreg').bfloat16(), 'rala')
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(1, 3, 32, 32).bfloat16()).isfinite().all()
    assert {p.device.type for p in linearize(timm_vit().to('meta'), 'rala').parameters()} == {'meta'}


def test_import_stays_light():
    code = """
import sys, adala_mm
heavy = [name for name in ('timm', 'transformers', 'mmengine', 'mmseg', 'mmdet', 'mmpretrain') if name in sys.modules]
assert not heavy, heavy
try:
    adala_mm.nothing
except AttributeError as error:
    assert 'nothing' in str(error)
import inspect, pickle
import adala_mm.alignment, adala_mm.linearization
for function in (adala_mm.align, adala_mm.linearize):  # functions, whatever was imported before
    assert inspect.isfunction(function) and pickle.loads(pickle.dumps(function)) is function
    assert function.__name__ in dir(adala_mm)
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=False,
                          cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
