"""Converted weights against the libraries that they come from; every key accounted for, nothing guessed."""
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import sys
from functools import cache, partial, reduce
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm import create_model
from timm.layers import get_act_layer, resample_abs_pos_embed, resample_patch_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn
from torch.nn import functional as F

import adala_mm
from adala_mm import linearize
from adala_mm.conversion import FAMILIES, SOURCES, compare, convert, metadata, resample, write
from adala_mm.conversion.convert import choose_family
from adala_mm.conversion.from_timm import TIMM, facts
from adala_mm.registry import MODELS
from helpers import ROOT

SOFTMAX = {'type': 'adala_mm.SoftmaxAttention'}
WIDTH, DEPTH, HEADS, GRID = 192, 2, 3, 4
BY_NAME = {source.name: source for source in SOURCES}
PAIRS = [(source.name, family) for source in SOURCES for family in source.families]
every_pair = pytest.mark.parametrize(('source', 'family'), PAIRS, ids=lambda value: value.replace(' ', '').lower())
# no packages: the oracle is timm, by its own conversion
OFFICIAL = ('official DINOv2', 'official DINOv3', 'OpenAI / OpenCLIP')


def patch_of(family: str) -> int:
    return 14 if 'dinov2' in family else 16


def randomise(model: nn.Module) -> nn.Module:
    """Weights that make every part of a model visible: libraries start positions near 0 and LayerScale at 1e-5."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1, std=0.2)
        elif re.search(r'(ls|layer_scale|gamma)\d$', name):
            for parameter in module.parameters():
                nn.init.normal_(parameter, mean=1, std=0.2)
    for name, parameter in model.named_parameters():
        if re.search(r'gamma_\d$', name):
            nn.init.normal_(parameter, mean=1, std=0.2)
    model.eval()  # that of mmpretrain returns nothing
    return model


def timm_model(family: str, grid=(GRID, GRID), **options) -> VisionTransformer:
    row, p = FAMILIES[family], patch_of(family)
    size = dict(img_size=(grid[0] * p, grid[1] * p), patch_size=p, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    if family == 'deit_distilled':
        return VisionTransformerDistilled(**size, num_classes=5, dynamic_img_size=True)
    return VisionTransformer(
        **size, class_token=row.class_token, reg_tokens=4 if row.registers else 0, no_embed_class=row.no_embed_class,
        pre_norm=row.pre_norm, init_values=row.layer_scale, act_layer=get_act_layer(row.act), dynamic_img_size=True,
        norm_layer=partial(nn.LayerNorm, eps=row.norm_eps), **({'num_classes': 0, 'global_pool': ''} | options)).eval()


def official_dinov2(family: str) -> dict[str, torch.Tensor]:
    """Random weights under the names of facebookresearch/dinov2."""
    state = randomise(timm_model(family)).state_dict()
    if family == 'dinov2_reg':  # the class token has a position, registers have none
        state['register_tokens'] = state.pop('reg_token')
        state['pos_embed'] = torch.cat([torch.randn(1, 1, WIDTH), state['pos_embed']], dim=1)
    return state | {'mask_token': torch.randn(1, WIDTH)}


def eva(gated: bool = False, biased: bool = True) -> Eva:
    """timm's DINOv3, narrow."""
    return randomise(create_model('vit_small_patch16_dinov3', embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
                                  swiglu_mlp=gated, swiglu_align_to=8 * gated, qkv_bias=biased))


def official_dinov3(model: Eva) -> dict[str, torch.Tensor]:
    """The weights of timm's model under the names of facebookresearch/dinov3, which has a bias of keys and masks it."""
    state = {'mask_token': torch.randn(1, WIDTH), 'storage_tokens': model.reg_token.detach(),
             'rope_embed.periods': (100 ** torch.arange(0, 1, 4 * HEADS / WIDTH)).bfloat16()}
    ours = {'gamma_1': 'ls1.gamma', 'gamma_2': 'ls2.gamma', 'attn.q_bias': 'attn.qkv.bias'}
    if hasattr(model.blocks[0].mlp, 'fc1_g'):
        ours |= {'mlp.fc1_g': 'mlp.w1', 'mlp.fc1_x': 'mlp.w2', 'mlp.fc2': 'mlp.w3'}
    for key, value in model.state_dict().items():
        name = reduce(lambda key, pair: key.replace(*pair), ours.items(), key)
        if key.endswith('q_bias'):
            state[name] = torch.cat([value, torch.randn(WIDTH), model.get_parameter(key.replace('q_', 'v_')).detach()])
            state[f'{name}_mask'] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(WIDTH)
        elif not key.endswith(('v_bias', 'reg_token')):
            state[name] = value
    return state


def transformers_dinov3(gated: bool = False):
    transformers = pytest.importorskip('transformers')
    return randomise(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        use_gated_mlp=gated, hidden_act='silu' if gated else 'gelu', num_register_tokens=4)))


def dinov3(source: str):
    """State dict, and final tokens."""
    if source.startswith('transformers'):
        model = transformers_dinov3('SwiGLU' in source)
        return model.state_dict(), lambda image: model(pixel_values=image).last_hidden_state
    model = eva()
    return model.state_dict() if source.startswith('timm') else official_dinov3(model), model.forward_features


def openai_clip() -> dict[str, torch.Tensor]:
    """Random weights under the names of OpenAI's CLIP, with some of the text tower."""
    def weights(name: str, rows: int, columns: int | None = None, mean: float = 0.0) -> dict[str, torch.Tensor]:
        shape = (rows,) if columns is None else (rows, columns)
        return {f'{name}weight': mean + 0.05 * torch.randn(shape), f'{name}bias': 0.05 * torch.randn(rows)}

    state = {'visual.class_embedding': torch.randn(WIDTH), 'visual.proj': torch.randn(WIDTH, 64),
             'visual.positional_embedding': 0.1 * torch.randn(GRID * GRID + 1, WIDTH),
             'visual.conv1.weight': 0.05 * torch.randn(WIDTH, 3, 16, 16),
             **weights('visual.ln_pre.', WIDTH, mean=1), **weights('visual.ln_post.', WIDTH, mean=1),
             'positional_embedding': torch.randn(7, 64), 'text_projection': torch.randn(64, 64),
             'logit_scale': torch.tensor(4.6), 'token_embedding.weight': torch.randn(9, 64),
             'transformer.resblocks.0.ln_1.weight': torch.randn(64), 'ln_final.bias': torch.randn(64)}
    for i in range(DEPTH):
        block = f'visual.transformer.resblocks.{i}.'
        state |= {**weights(f'{block}ln_1.', WIDTH, mean=1), **weights(f'{block}ln_2.', WIDTH, mean=1),
                  **weights(f'{block}attn.in_proj_', 3 * WIDTH, WIDTH),
                  **weights(f'{block}attn.out_proj.', WIDTH, WIDTH),
                  **weights(f'{block}mlp.c_fc.', 4 * WIDTH, WIDTH), **weights(f'{block}mlp.c_proj.', WIDTH, 4 * WIDTH)}
    return state


KINDS = {'augreg': 'ViT', 'deit': 'ViT', 'deit_distilled': 'DeiT', 'mae': 'ViTMAE', 'dinov2': 'Dinov2',
         'dinov2_reg': 'Dinov2WithRegisters', 'siglip_tanh': 'SiglipVision'}


def transformers_model(family: str, kind: str | None = None, **options):
    """With the library's own epsilon and activation, except for CLIP, whose published ones differ."""
    transformers = pytest.importorskip('transformers')
    kind = kind or KINDS.get(family, 'CLIPVision')
    options |= dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, patch_size=patch_of(family),
                    image_size=GRID * patch_of(family))
    if kind == 'CLIPVision':
        options |= dict(hidden_act=FAMILIES[family].act, layer_norm_eps=FAMILIES[family].norm_eps)
    if 'dinov2' not in family:
        options['intermediate_size'] = 4 * WIDTH
    head = kind if 'For' in kind else f'{kind}Model'
    config = getattr(transformers, f'{kind.partition("For")[0]}Config')(**options)
    return randomise(getattr(transformers, head)(config))


def vision_tower(model):
    """The ViT: in transformers 4 it is inside."""
    return getattr(model, 'vision_model', model)


def mmpretrain_model(family: str, grid=(GRID, GRID)):
    from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
    row, p = FAMILIES[family], patch_of(family)
    return randomise(MMPRETRAIN_MODELS.build(dict(
        type='mmpretrain.VisionTransformer', img_size=(grid[0] * p, grid[1] * p), patch_size=p, out_type='raw',
        arch=dict(embed_dims=WIDTH, num_layers=DEPTH, num_heads=HEADS, feedforward_channels=4 * WIDTH),
        norm_cfg=dict(type='LN', eps=row.norm_eps), layer_scale_init_value=row.layer_scale or 0.0,
        pre_norm=row.pre_norm,
        layer_cfgs=dict(act_cfg=dict(type='mmpretrain.QuickGELU' if row.act == 'quick_gelu' else 'GELU')))))


@cache
def original(source: str, family: str):
    """(state dict of a small random model of the source library, its final tokens as a function of the image)."""
    torch.manual_seed(0)
    if 'dinov3' in family:
        return dinov3(source)
    if source in OFFICIAL:
        state = official_dinov2(family) if source == 'official DINOv2' else openai_clip()
        model = timm_model(family)
        theirs = checkpoint_filter_fn(dict(state), model)
        model.load_state_dict({key: theirs[key] for key in model.state_dict()})
        return state, model.forward_features
    if source == 'timm':
        model = randomise(timm_model(family))
        return model.state_dict(), model.forward_features
    if source == 'mmpretrain':
        model = mmpretrain_model(family)
        return model.state_dict(), lambda image: model(image)[0]
    if family == 'mae':  # without masks, and sorted back
        model = transformers_model(family, mask_ratio=0.0)

        def tokens(image):
            out = model(pixel_values=image)
            patches = out.last_hidden_state[:, 1:]
            order = out.ids_restore[..., None].expand_as(patches)
            return torch.cat([out.last_hidden_state[:, :1], patches.gather(1, order)], dim=1)

        return model.state_dict(), tokens
    model = transformers_model(family)
    norm = vision_tower(model).post_layernorm if 'clip' in family else None
    return model.state_dict(), lambda image: (norm or nn.Identity())(model(pixel_values=image).last_hidden_state)


def ours(converted):
    """The softmax ViT that a conversion describes, with its weights."""
    model = MODELS.build({'type': 'adala_mm.AdaLAViT', 'attention': SOFTMAX} | converted.config)
    model.load_state_dict(converted.state)
    return model.eval()


def difference(ours, theirs) -> float:
    assert ours.shape == theirs.shape and theirs.std() > 0.1
    return (ours - theirs).abs().max().item()


# --- features, against the source library -----------------------------------------------------------------------------

@every_pair
@torch.no_grad()
def test_tokens_equal_the_source(source, family):
    state, theirs = original(source, family)
    before = {key: value.clone() for key, value in state.items()}
    converted = convert(state, family)
    assert converted.source.name == source and converted.family_name == family
    model, p = ours(converted), patch_of(family)
    # transformers (but for DINOv2 with registers) and mmpretrain resize positions without antialiasing, which is
    # another bicubic kernel: there the native size alone is comparable.
    for h, w in ((GRID, GRID), *([(6, 6), (3, 5), (2, 8)] if family in BY_NAME[source].any_size else ())):
        image = torch.randn(2, 3, h * p, w * p)
        assert difference(model.forward_features(image), theirs(image)) < 1e-4, (h, w)
    assert all(torch.equal(state[key], value) for key, value in before.items())


@every_pair
def test_the_check_builds_the_same_model(source, family):
    state, theirs = original(source, family)
    p = GRID * patch_of(family)
    image = torch.randn(1, 3, p, p)
    note, greatest, _ = compare(convert(state, family), state, image)
    assert greatest < 1e-4
    wanted = 'timm' if source in OFFICIAL else source.split(',')[0]
    assert note.startswith(f'{wanted} {sys.modules[wanted].__version__}')
    assert ('own conversion' in note) == (source in OFFICIAL)


def test_the_check_sees_a_wrong_weight():
    state, _ = original('timm', 'deit')
    converted = convert(state, 'deit')
    converted.state['blocks.1.mlp.fc2.weight'] = 1.05 * converted.state['blocks.1.mlp.fc2.weight']
    assert compare(converted, state, torch.randn(1, 3, 64, 64))[1] > 1e-2


def test_the_check_without_the_library_says_so(monkeypatch):
    state, _ = original('mmpretrain', 'deit')
    converted = convert(state, 'deit')
    monkeypatch.setitem(sys.modules, 'mmpretrain', None)
    note, greatest, _ = compare(converted, state, torch.randn(1, 3, 64, 64))
    assert note.startswith('timm') and 'mmpretrain' in note and 'not installed' in note and greatest < 1e-4


@torch.no_grad()
def test_mmpretrain_native_and_not_square():
    model = mmpretrain_model('dinov2', (2, 5))
    with pytest.raises(ValueError, match='pos_embed has 11 entries.*--img-size HEIGHT WIDTH'):
        convert(model.state_dict())
    converted = convert(model.state_dict(), img_size=(28, 70))
    assert converted.grid == (2, 5) and converted.config['img_size'] == (28, 70)
    image = torch.randn(1, 3, 28, 70)
    assert difference(ours(converted).forward_features(image), model(image)[0]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(('family', 'wrapper'), [
    ('augreg', 'vit.'), ('deit_distilled', 'deit.'), ('mae', 'vit.'), ('dinov2', 'dinov2.'),
    ('dinov2_reg', 'dinov2_with_registers.'), ('clip_openai', 'vision_model.'), ('siglip_tanh', 'vision_model.')])
def test_files_of_transformers(family, wrapper, tmp_path):
    # In files attention has other names than in memory, and larger models put a prefix before them.
    model = transformers_model(family)
    model.save_pretrained(tmp_path)
    state = {key.removeprefix('vision_model.'): value
             for key, value in load_file(tmp_path / 'model.safetensors').items()}
    assert 'lip' in family or 'encoder.layer.0.attention.attention.query.weight' in state
    wanted = convert(model.state_dict(), family)
    for prefix in ('', wrapper):
        found = convert({prefix + key: value for key, value in state.items()}, family)
        assert found.prefix == prefix and found.state.keys() == wanted.state.keys()
        assert all(torch.equal(found.state[key], value) for key, value in wanted.state.items())
        image = torch.randn(1, 3, *[GRID * patch_of(family)] * 2)
        assert compare(found, {prefix + key: value for key, value in state.items()}, image)[1] < 1e-4


@pytest.mark.parametrize(('kind', 'family', 'dropped'), [
    ('ViTForImageClassification', 'augreg', {'classifier or projection': 2}),
    ('ViT', 'deit', {'pooler of the class token': 2}),
    ('DeiTForImageClassificationWithTeacher', 'deit_distilled', {'classifier or projection': 4}),
    ('ViTMAEForPreTraining', 'mae', {'decoder, for pretraining only': 24})])
def test_what_transformers_has_around_a_vit(kind, family, dropped):
    model = transformers_model(family, kind, **(dict(
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=1,
        decoder_intermediate_size=64) if family == 'mae' else {}))
    converted = convert(model.state_dict(), family)
    assert {text.split(':')[0]: count for step, count, text in converted.report if step == 'dropped'} == dropped
    assert converted.config['norm_eps'] == converted.family.norm_eps == model.config.layer_norm_eps == 1e-12
    assert compare(converted, model.state_dict(), torch.randn(1, 3, 64, 64))[1] < 1e-4


@torch.no_grad()
@pytest.mark.parametrize('grid', [(GRID, GRID), (6, 6)])
def test_naflex_is_a_convolution_at_its_own_grid(grid):
    model = transformers_model('siglip_tanh', 'Siglip2Vision', num_patches=GRID * GRID)
    state = model.state_dict()
    converted = convert(state)
    assert converted.family_name == 'siglip_tanh' and converted.config['img_size'] == 64
    assert ('reshaped', 1, 'patch kernel of flattened patches to one of 16 x 16 pixels') in converted.report
    image = torch.randn(2, 3, 16 * grid[0], 16 * grid[1])
    rows = image.reshape(2, 3, grid[0], 16, grid[1], 16).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, row, column, channel)
    theirs = model(pixel_values=rows.reshape(2, grid[0] * grid[1], -1), spatial_shapes=torch.tensor([grid] * 2),
                   pixel_attention_mask=torch.ones(2, grid[0] * grid[1], dtype=torch.long)).last_hidden_state
    greatest = difference(ours(converted).forward_features(image), theirs)
    if grid == (GRID, GRID):
        assert greatest < 1e-4 and compare(converted, state, image)[1] < 1e-4
    else:  # bilinear positions there, bicubic ones here, as docs/weights.md says
        assert greatest > 1e-3
    key = next(key for key in state if key.endswith('patch_embedding.weight'))
    with pytest.raises(ValueError, match=r'patch_embedding.weight has the shape \(192, 700\): not flattened square'):
        convert(state | {key: state[key][:, :700]})


def test_clip_inside_the_whole_model_of_transformers():
    transformers = pytest.importorskip('transformers')
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50,
                bos_token_id=0, eos_token_id=1)
    vision = transformers_model('clip_openai')
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision.config.to_dict(),
                                                           projection_dim=16))
    model.vision_model.load_state_dict(vision_tower(vision).state_dict())
    found, wanted = convert(model.state_dict(), 'clip_openai'), convert(vision.state_dict(), 'clip_openai')
    assert all(torch.equal(found.state[key], value) for key, value in wanted.state.items())
    dropped = {text.split(':')[0]: count for step, count, text in found.report if step == 'dropped'}
    assert dropped == {'text tower': sum(key.startswith('text_') for key in model.state_dict()),
                       'projection to the space of text': 1, 'scale of the contrastive loss': 1}


def test_chunked_blocks_of_dinov2():
    state = official_dinov2('dinov2')
    wanted = convert(state).state
    # the second number counts through all chunks
    chunked = {re.sub(r'blocks\.(\d)', r'blocks.\1.\1', key): value for key, value in state.items()}
    found = convert(chunked)
    assert found.source.name == 'official DINOv2' and found.state.keys() == wanted.keys()
    assert all(torch.equal(found.state[key], value) for key, value in wanted.items())
    assert compare(found, chunked, torch.randn(1, 3, 56, 56))[1] < 1e-4
    with pytest.raises(ValueError, match='two keys of official DINOv2 weights are blocks.0.norm1.weight'):
        convert(chunked | {'blocks.1.0.norm1.weight': torch.ones(WIDTH)})


def test_the_visual_tower_alone_and_in_half_precision():
    state = openai_clip()
    wanted = convert(state, 'openclip').state
    tower = {key.removeprefix('visual.'): value.half() for key, value in state.items() if key.startswith('visual.')}
    found = convert(tower, 'openclip')
    assert found.prefix == '' and all(value.dtype == torch.float32 for value in found.state.values())
    assert all(torch.equal(found.state[key], value.half().float()) for key, value in wanted.items())
    assert ('cast', len(wanted), 'to float32') in found.report
    with pytest.raises(ValueError, match='nothing explains: transformer.resblocks.0.ls_1.gamma'):  # no text tower here
        convert(tower | {'transformer.resblocks.0.ls_1.gamma': torch.ones(WIDTH)}, 'openclip')


def accounted(converted) -> int:
    return sum(count for step, count, _ in converted.report if step in ('loaded', 'dropped'))


# --- keys -------------------------------------------------------------------------------------------------------------

@every_pair
def test_every_key_is_accounted_for(source, family):
    state, _ = original(source, family)
    converted = convert(state, family)
    assert accounted(converted) == len(state)
    extra = converted.prefix + 'blocks.0.attn.mystery'
    with pytest.raises(ValueError, match=rf'1 keys of {re.escape(source)}.* nothing explains: {extra}'):
        convert(state | {extra: torch.ones(1)}, family)


@pytest.mark.parametrize(('source', 'family'), [
    ('timm', 'deit'), ('timm', 'dinov2_reg'), ('official DINOv2', 'dinov2_reg'), ('OpenAI / OpenCLIP', 'clip_openai'),
    ('transformers, DINOv2', 'dinov2'), ('transformers, CLIP and SigLIP', 'siglip_tanh'), ('mmpretrain', 'dinov2'),
    ('transformers, ViT, DeiT and MAE', 'deit'), ('official DINOv3', 'dinov3'),
    ('transformers, DINOv3 with SwiGLU', 'dinov3')])
def test_each_missing_or_misshapen_key_is_named(source, family):
    state, row = original(source, family)[0], BY_NAME[source]
    prefix = convert(state, family).prefix
    named = 0
    for key in [key for key in state if key.startswith(prefix) and row.our_key(key.removeprefix(prefix))]:
        short = key.removeprefix(prefix)
        name = row.own_key(row.our_key(short))  # as in files; in memory transformers 5 has other names
        rest = {other: value for other, value in state.items() if other != key}
        with pytest.raises(ValueError) as error:
            convert(rest, family)
        if f'missing: {name}' in str(error.value):
            named += 1
        else:  # a file without these is of no source, or another ViT, and the message says so
            assert row.our_key(short) in ('cls_token', 'reg_token', 'patch_embed.proj.weight', 'pos_embed',
                                          'blocks.0.norm1.weight'), key
            assert re.search(r'no known source|cls_token|class.token|no registers', str(error.value))
        if state[key].ndim == 1 and 'attention' not in key and 'attn' not in key and 'class' not in key:
            with pytest.raises(ValueError, match=re.escape(f'{name} (7,) instead of')):
                convert(state | {key: torch.ones(7)}, family)
    assert named >= len(state) - 14


@pytest.mark.parametrize(('source', 'family', 'whole'), [
    ('timm', 'siglip', ''), ('official DINOv2', 'dinov2', ''), ('OpenAI / OpenCLIP', 'openclip', ''),
    ('transformers, ViT, DeiT and MAE', 'deit', 'deit.'), ('transformers, ViT, DeiT and MAE', 'mae', 'vit.'),
    ('transformers, DINOv2', 'dinov2', 'dinov2.'), ('transformers, CLIP and SigLIP', 'openclip', 'vision_model.'),
    ('mmpretrain', 'deit', 'backbone.'), ('mmpretrain', 'openclip', 'visual.'), ('official DINOv3', 'dinov3', ''),
    ('timm, DINOv3', 'dinov3', ''), ('transformers, DINOv3', 'dinov3_sat', 'dinov3_vit.')])
def test_every_rule_drops_and_is_reported(source, family, whole):
    state, row = original(source, family)[0], BY_NAME[source]
    state = {whole + key.removeprefix(whole): value for key, value in state.items()}
    prefix = convert(state, family).prefix
    for rules, start in ((row.drop, prefix), (row.outside, '')):
        for template, reason in rules.items():
            key = start + template.replace('**', 'x.bias').replace('*', 'weight').replace('#', '0')
            converted = convert({key: torch.ones(3)} | state, family)
            assert any(step == 'dropped' and text.startswith(f'{reason}: ') for step, _, text in converted.report), key
            assert accounted(converted) == len(state | {key: 0})


# --- families ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('source', 'family', 'choices'), [
    ('timm', 'augreg', 'augreg deit mae'), ('transformers, ViT, DeiT and MAE', 'mae', 'augreg deit mae'),
    ('timm', 'clip_openai', 'clip_openai openclip openclip_quickgelu openclip_half'),
    ('timm', 'siglip', 'siglip siglip_tanh'), ('mmpretrain', 'deit', 'augreg deit'),
    ('mmpretrain', 'openclip', 'clip_openai openclip openclip_quickgelu openclip_half'),
    ('OpenAI / OpenCLIP', 'openclip', 'clip_openai openclip openclip_quickgelu openclip_half'),
    ('transformers, CLIP and SigLIP', 'openclip', 'clip_openai openclip openclip_quickgelu openclip_half')])
def test_an_ambiguous_family_is_asked_for(source, family, choices):
    with pytest.raises(ValueError, match='choose with --family') as error:
        convert(original(source, family)[0])
    assert re.findall(r'^  (\w+): ', str(error.value), re.M) == choices.split()
    assert ('norm eps 1e-12' in str(error.value)) == ('ViT' in source)  # as the library runs them


@pytest.mark.parametrize(('source', 'family'), [
    (source, family) for source, family in PAIRS
    if 'dinov2' in family or family in ('dinov3', 'deit_distilled') or (
        source.startswith('transformers') and family == 'siglip_tanh')])
def test_a_plain_family_is_not(source, family):
    assert convert(original(source, family)[0]).family_name == family


@pytest.mark.parametrize(('source', 'family', 'wrong', 'message'), [
    ('timm', 'deit', 'dinov2', 'not of the family dinov2.*no LayerScale.*augreg, deit'),
    ('timm', 'dinov2', 'dinov2_reg', 'not of the family dinov2_reg.*no registers'),
    ('OpenAI / OpenCLIP', 'openclip', 'siglip', 'not of the family siglip'),
    ('timm', 'deit', 'vit', "unknown family 'vit'; choose one of augreg, deit")])
def test_a_wrong_family_is_an_error(source, family, wrong, message):
    with pytest.raises(ValueError, match=message):
        convert(original(source, family)[0], wrong)


@pytest.mark.parametrize(('name', 'family'), [
    ('vit_large_patch16_224.augreg_in21k_ft_in1k', 'augreg'), ('deit_small_patch16_224.fb_in1k', 'deit'),
    ('deit_small_distilled_patch16_224.fb_in1k', 'deit_distilled'), ('vit_base_patch16_224.mae', 'mae'),
    ('vit_base_patch14_dinov2.lvd142m', 'dinov2'), ('vit_small_patch14_reg4_dinov2.lvd142m', 'dinov2_reg'),
    ('vit_large_patch14_clip_quickgelu_224.openai', 'clip_openai'), ('vit_base_patch16_clip_224.laion2b', 'openclip'),
    ('vit_base_patch16_clip_quickgelu_224.metaclip_400m', 'openclip_quickgelu'),
    ('vit_large_patch14_clip_224.laion2b', 'openclip_half'), ('vit_large_patch16_siglip_256.webli', 'siglip'),
    ('vit_base_patch16_siglip_512.v2_webli', 'siglip'), ('vit_large_patch16_siglip_384.v2_webli', 'siglip'),
    ('vit_large_patch16_siglip_512.v2_webli', 'siglip_tanh')])
def test_a_name_of_timm_settles_the_family(name, family):
    known = facts(name)
    state = convert(original('timm', family)[0], family).state
    assert choose_family(state, (GRID, GRID), TIMM, None, known) == family
    assert known['num_heads'] == (6 if 'small' in name else 12 if 'base' in name else 16)


def test_a_name_of_timm_that_runs_weights_with_another_activation():
    state, _ = original('timm', 'openclip')
    with pytest.raises(ValueError, match='timm runs vit_base_patch16_clip_224.openai with GELU, but notes.*quickgelu'):
        choose_family(state, (GRID, GRID), TIMM, None, facts('vit_base_patch16_clip_224.openai'))
    assert facts('no_such_model') is None and facts('resnet18') is None


# --- DINOv3: what its files have beside ------------------------------------------------------------------------------

@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('gated', [False, True])
def test_dinov3_official_and_in_timm(gated, biased):
    model = eva(gated, biased)
    states = {'timm, DINOv3': model.state_dict(), 'official DINOv3': official_dinov3(model)}
    for (source, state), image in zip(states.items(), (torch.randn(1, 3, 64, 64), torch.randn(1, 3, 48, 80)),
                                      strict=True):
        converted = convert(state)
        assert (converted.source.name, converted.family_name) == (source, 'dinov3')
        config = dict(img_size=256, patch_size=16, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, norm_eps=1e-5,
                      layer_scale=1e-5, num_registers=4, qkv_bias=biased, rotary={})
        config |= {'swiglu': True} if gated else {}
        assert converted.config == config
        with torch.no_grad():
            assert difference(ours(converted).forward_features(image), model.forward_features(image)) < 1e-5


def test_biases_of_zeros_are_left_out():
    model = eva()
    for block in model.blocks:
        nn.init.zeros_(block.attn.q_bias)
        nn.init.zeros_(block.attn.v_bias)
    for state in (model.state_dict(), official_dinov3(model)):
        converted = convert(state)
        assert not converted.config['qkv_bias'] and 'blocks.0.attn.qkv.bias' not in converted.state
        assert ('left out', DEPTH, 'biases of queries, keys and values, which are zero') in converted.report
        assert compare(converted, state, torch.randn(1, 3, 64, 64))[1] < 1e-5


def test_the_check_of_dinov3_without_transformers(monkeypatch):
    state = transformers_dinov3(gated=True).state_dict()
    converted = convert(state)
    monkeypatch.setitem(sys.modules, 'transformers', None)
    note, greatest, _ = compare(converted, state, torch.randn(1, 3, 64, 64))
    assert 'transformers is not installed' in note and greatest < 1e-4


@pytest.mark.parametrize(('name', 'family', 'heads', 'licence'), [
    ('vit_base_patch16_dinov3.lvd1689m', 'dinov3', 12, 'dinov3-license'),
    ('vit_huge_plus_patch16_dinov3.lvd1689m', 'dinov3', 20, 'dinov3-license'),
    ('vit_large_patch16_dinov3.lvd1689m', 'dinov3', 16, 'dinov3-license'),
    ('vit_large_patch16_dinov3_qkvb.sat493m', 'dinov3_sat', 16, 'dinov3-license'),
    ('vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m', 'dinov3', 3, 'fair-noncommercial-research-license')])
def test_a_name_of_timm_settles_which_dinov3(name, family, heads, licence):
    known = facts(name)
    state = dict(convert(original('timm, DINOv3', 'dinov3')[0]).state)
    state['patch_embed.proj.weight'] = torch.empty(1024 if 'large' in name else 768, 3, 16, 16, device='meta')
    assert choose_family(state, (16, 16), BY_NAME['timm, DINOv3'], None, known) == family
    assert (known['num_heads'], known['licence']) == (heads, licence)


def test_a_large_dinov3_may_be_of_satellite_images():
    state = dict(convert(original('timm, DINOv3', 'dinov3')[0]).state)
    state['patch_embed.proj.weight'] = torch.empty(1024, 3, 16, 16, device='meta')
    with pytest.raises(ValueError, match='(?s)choose with --family.*dinov3: .*dinov3_sat: .*109.65'):
        choose_family(state, (16, 16), BY_NAME['official DINOv3'], None, None)


def test_other_wave_lengths_are_refused():
    state = official_dinov3(eva())
    with pytest.raises(ValueError, match=r'rope_embed\.periods has 16 wave lengths.*--num-heads'):
        convert(state, num_heads=6)
    with pytest.raises(ValueError, match=r'rope_embed\.periods has 16 wave lengths.* to 5623.*1 to 74\.99'):
        convert(state | {'rope_embed.periods': 10000 ** torch.arange(0, 1, 1 / 16)})


def without(state: dict, *words: str) -> dict:
    return {key: value for key, value in state.items() if not any(word in key for word in words)}


def plain(**options):
    return timm_model('deit', **options).state_dict()


def small(name: str) -> dict[str, torch.Tensor]:
    return timm.create_model(name, depth=1).state_dict()


ONE = torch.ones(1)
REFUSED = {
    'NaFlex of timm': (lambda: timm.create_model('naflexvit_base_patch16_siglip', depth=1, embed_dim=64,
                                                 num_heads=1).state_dict(), 'embeds.*NaFlexVit.*transformers has them'),
    'SwiGLU, packed': (lambda: plain() | {'blocks.0.mlp.fc2.weight': torch.ones(WIDTH, 2 * WIDTH)}, 'SwiGLU'),
    'SwiGLU, official': (lambda: official_dinov2('dinov2') | {'blocks.0.mlp.w12.weight': ONE}, 'SwiGLU'),
    'SwiGLU, transformers': (lambda: original('transformers, DINOv2', 'dinov2')[0]
                             | {'encoder.layer.0.mlp.weights_in.weight': ONE}, 'SwiGLU'),
    'SwiGLU, mmpretrain': (lambda: original('mmpretrain', 'dinov2')[0] | {'layers.0.ffn.w12.bias': ONE}, 'SwiGLU'),
    'EVA': (lambda: plain() | {'rope.freqs': ONE}, 'rotary'),
    'EVA-02, packed': (lambda: small('eva02_tiny_patch14_224'), r'mlp\.fc1\.weight: rotary positions other than'),
    'EVA-02, two matrices': (lambda: small('eva02_base_patch14_224'), r'mlp\.fc1_g\.weight: rotary positions other'),
    'PE core': (lambda: small('vit_pe_core_tiny_patch16_384'), r'attn_pool\.latent.*PE core has rotary positions'),
    'BEiT': (lambda: original('mmpretrain', 'deit')[0] | {'layers.0.attn.relative_position_bias_table': ONE},
             'relative positions'),
    'norms of q and k': (lambda: plain() | {'blocks.0.attn.q_norm.weight': ONE}, 'queries and keys are normalised'),
    'pooled': (lambda: timm_model('deit', global_pool='avg', num_classes=5).state_dict(), 'fc_norm.*after pooling'),
    'DeiT III': (lambda: VisionTransformer(img_size=64, embed_dim=WIDTH, depth=1, num_heads=3, no_embed_class=True,
                                           init_values=1e-6, num_classes=0).state_dict(),
                 'LayerScale.*positions for patches only is of no known family'),
    'I-JEPA': (lambda: transformers_model('deit', 'IJepa').state_dict(),
               'no class token.*is of no known family of transformers, ViT.*none fits as --family'),
    'Depth Anything': (lambda: {f'backbone.{key}': value for key, value in original('transformers, DINOv2', 'dinov2')[
        0].items()} | {'neck.x': ONE}, 'no known source.*under backbone.* is of transformers, DINOv2: --key backbone$'),
    'OpenCLIP around timm': (lambda: {f'visual.trunk.{key}': value for key, value in plain().items()},
                             r'visual\.trunk\.state_dict'),
    'ours': (lambda: {f'backbone.{key}': value for key, value in plain().items()}, 'our own keys already'),
    'linearized': (lambda: linearize(timm_model('deit')).state_dict(),
                   r'linearized model .with keys such as blocks\.0\.attn\.adala_mm.*init_cfg.*adala_mm\.load'),
    'ResNet': (lambda: {'conv1.weight': ONE, 'layer1.0.conv1.weight': ONE},
               r'no known source \(timm; official DINOv2; .*\).*layer1.0.conv1.weight$'),
    'two towers': (lambda: plain() | openai_clip(), 'several models.*timm.*OpenAI'),
    'grey-scale': (lambda: plain() | {'patch_embed.proj.weight': torch.ones(WIDTH, 1, 16, 16)}, 'patch_embed.*RGB'),
    'gap': (lambda: without(timm_model('deit').state_dict(), 'blocks.1') | {'blocks.2.norm1.weight': torch.ones(WIDTH)},
            'missing: blocks.1.norm1.weight'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_with_a_reason(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=f'(?s){message}'):
        convert(make(), 'deit' if case in ('grey-scale', 'gap') else None)


@pytest.mark.parametrize('family', [None, 'openclip'])
@pytest.mark.parametrize(('name', 'source', 'weights'), [
    ('vit_pe_core_tiny_patch16_384', 'timm', 'openclip'), ('vit_pe_spatial_tiny_patch16_512', 'timm', 'openclip'),
    ('vit_medium_patch16_rope_reg1_gap_256', 'timm, DINOv3', 'dinov3')])
def test_a_name_of_timm_with_other_rotary_positions_is_refused(name, source, weights, family):
    with pytest.raises(ValueError, match=f'^{name} has rotary positions of another kind.*Cat.*linearize'):
        convert(original(source, weights)[0], family, name=name)


def test_a_family_that_the_source_has_not_is_no_way_out():
    with pytest.raises(ValueError, match='no class token.*is of no known family of transformers, ViT'):
        convert(transformers_model('deit', 'IJepa').state_dict(), 'siglip')


@pytest.mark.parametrize('gated', [False, True])
def test_a_classifier_on_dinov3_of_transformers(gated):
    inside = {f'dinov3_vit.{key}': value for key, value in transformers_dinov3(gated).state_dict().items()}
    state = inside | {'classifier.weight': torch.ones(5, WIDTH), 'classifier.bias': torch.ones(5)}
    converted = convert(state)
    assert ('dropped', 2, 'classifier or projection: classifier.weight, classifier.bias') in converted.report
    assert compare(converted, state, torch.randn(1, 3, 64, 64))[1] < 1e-4


def test_unusual_width_asks_for_heads():
    state = VisionTransformer(img_size=32, embed_dim=48, depth=1, num_heads=3, num_classes=0).state_dict()
    with pytest.raises(ValueError, match='width 48 with an MLP of 192.*--num-heads'):
        convert(state, 'deit')
    assert convert(state, 'deit', num_heads=3).config['num_heads'] == 3


@pytest.mark.parametrize(('width', 'hidden', 'heads'), [(1152, 4304, 16), (1408, 6144, 16), (1664, 8192, 16)])
def test_odd_mlp_widths(width, hidden, heads):
    with torch.device('meta'):
        state = VisionTransformer(img_size=32, embed_dim=width, depth=1, num_heads=heads, mlp_ratio=hidden / width,
                                  num_classes=0).state_dict()
        state = {key: value if value.shape[0] != int(width * hidden / width) else value for key, value in state.items()}
    converted = convert(state, 'deit')
    assert converted.config['num_heads'] == heads and int(width * converted.config['mlp_ratio']) == hidden


# --- sizes, and what configs and pages say ----------------------------------------------------------------------------

@pytest.mark.parametrize(('patch', 'method', 'size'), [(16, 'flexi', None), (16, 'bicubic', (64, 96)),
                                                       (8, 'flexi', (40, 40)), (None, 'flexi', (28, 70))])
@pytest.mark.parametrize('family', ['dinov2', 'dinov2_reg'])
def test_resampling_equals_timm_and_is_reported(family, patch, method, size):
    state, _ = original('timm', family)
    native = convert(state)
    done = resample(native, patch, method, size)
    p = patch or 14
    grid = (size[0] // p, size[1] // p) if size else (GRID, GRID)
    assert done.grid == grid and native.grid == (GRID, GRID) and native.config['patch_size'] == 14
    kernel = state['patch_embed.proj.weight']
    if patch:
        kernel = (resample_patch_embed(kernel, [p, p]) if method == 'flexi' else
                  F.interpolate(kernel, size=(p, p), mode='bicubic', align_corners=False))
    position = resample_abs_pos_embed(state['pos_embed'], list(grid), [GRID, GRID],
                                      num_prefix_tokens=0 if family == 'dinov2_reg' else 1)
    torch.testing.assert_close(done.state['patch_embed.proj.weight'], kernel, rtol=0, atol=0)
    torch.testing.assert_close(done.state['pos_embed'], position, rtol=0, atol=0)
    told = [text for step, _, text in done.report if step == 'resampled']
    assert told == ([f'patch kernel 14 -> {p}, {method}'] if patch else []) + (
        [f'positions 4x4 -> {grid[0]}x{grid[1]}, bicubic, antialiased'] if size else [])
    assert [text for step, _, text in native.report if step == 'resampled'] == []
    ours(done)  # loads strictly
    assert (native.state['patch_embed.proj.weight'] == state['patch_embed.proj.weight']).all()


def test_sizes_that_do_not_fit():
    native = convert(original('timm', 'dinov2')[0])
    with pytest.raises(ValueError, match='512 x 512 cannot be cut into patches of 14; 518 x 518 can'):
        resample(native, img_size=(512, 512))
    with pytest.raises(ValueError, match="unknown patch method 'nearest'; choose one of flexi, bicubic"):
        resample(native, 16, 'nearest')


@pytest.mark.parametrize('name', [name for name, row in FAMILIES.items() if row.configs])
def test_families_agree_with_the_configs(name):
    row = FAMILIES[name]
    for config in row.configs:
        path = ROOT / f'configs/_base_/backbones/{config}.py'
        cfg = Config.fromfile(path)
        backbone = cfg.backbone
        assert (tuple(cfg.preprocessor.mean), tuple(cfg.preprocessor.std)) == row.normalise
        for key, default in (('norm_eps', 1e-6), ('act', 'gelu'), ('class_token', True), ('no_embed_class', False),
                             ('pre_norm', False), ('layer_scale', None)):
            assert backbone.get(key, default) == getattr(row, key), (config, key)
        assert bool(backbone.get('num_registers')) == row.registers
        assert row.licence in path.read_text().split('softmax')[0], config


def test_every_backbone_config_with_weights_has_a_family():
    files = {path.stem for path in (ROOT / 'configs/_base_/backbones').glob('*.py') if 'timm' in path.read_text()}
    assert files == {config for row in FAMILIES.values() for config in row.configs} and len(files) > 4


def test_families_of_one_source_can_be_told_apart():
    rows = [(row.normalise, row.licence, *vars(row).values()) for row in FAMILIES.values()]
    assert len({str(row) for row in rows}) == len(FAMILIES)
    assert {family for source in SOURCES for family in source.families} == set(FAMILIES)


# The command


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('convert_vfm', ROOT / 'tools/convert_vfm.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, monkeypatch, capsys):
    """Runs the command; returns what it printed."""
    def run(*arguments) -> str:
        monkeypatch.setattr(sys, 'argv', ['convert_vfm.py', *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out
    return run


@pytest.fixture
def src(tmp_path) -> Path:
    path = tmp_path / 'src.safetensors'
    save_file({key: value.contiguous() for key, value in original('timm', 'deit')[0].items()}
              | {'head.weight': torch.randn(5, WIDTH)}, path)
    return path


@torch.no_grad()
def test_the_command(run, src, tmp_path):
    out = tmp_path / 'new' / 'out.safetensors'
    printed = run(src, out, '--family', 'deit', '--patch-size', 8, '--img-size', 48, 64, '--check')
    for line in ('| loaded | 30 | timm |', '| dropped | 1 | classifier or projection: head.weight |',
                 '| resampled | 1 | patch kernel 16 -> 8, flexi |',
                 '| resampled | 1 | positions 4x4 -> 6x8, bicubic, antialiased |'):
        assert line in printed
    assert re.search(r'photograph of matplotlib at native size: tokens differ by at most \S+ from timm 1', printed)

    with safe_open(out, 'pt') as file:
        notes, keys = file.metadata(), file.keys()
    assert all(key.startswith('backbone.') for key in keys) and len(keys) == 30
    mean, std = FAMILIES['deit'].normalise
    assert notes == {
        'format': 'pt', 'adala_mm': adala_mm.__version__, 'source': 'timm: src.safetensors', 'family': 'deit',
        'sha256': hashlib.sha256(src.read_bytes()).hexdigest(), 'licence': 'Apache-2.0', 'patch_size': '8',
        'mean': json.dumps(mean), 'std': json.dumps(std), 'position_grid': '6x8',
        'resampled': 'patch kernel 16 -> 8, flexi; positions 4x4 -> 6x8, bicubic, antialiased'}

    # The printed config loads the file, strictly, and gives the features of timm's ViT at patch 8.
    scope: dict = {}
    exec(printed[printed.index('preprocessor = '):], scope)
    assert scope['preprocessor'] == dict(mean=list(mean), std=list(std))
    assert scope['backbone']['attention'] == {'type': 'adala_mm.LinearAttention'}
    model = MODELS.build(scope['backbone'] | {'attention': SOFTMAX})
    model.init_weights()
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0,
                               dynamic_img_size=True).eval()
    state = original('timm', 'deit')[0]
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    image = torch.randn(1, 3, 48, 64)
    assert difference(model.eval().forward_features(image), theirs.forward_features(image)) < 1e-4


def test_check_on_a_given_image(run, src, tmp_path):
    from PIL import Image
    Image.new('L', (50, 30), 128).save(tmp_path / 'grey.png')
    printed = run(src, tmp_path / 'out.safetensors', '--family', 'deit', '--check', tmp_path / 'grey.png')
    assert f'{tmp_path / "grey.png"} at native size' in printed
    with pytest.raises(SystemExit, match=r'absent\.png'):
        run(src, tmp_path / 'out2.safetensors', '--family', 'deit', '--check', tmp_path / 'absent.png')
    assert not (tmp_path / 'out2.safetensors').exists()


def test_nothing_is_written_if_the_features_differ(run, tool, src, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'compare', lambda *_: ('timm', 0.3, 2.0))
    with pytest.raises(SystemExit, match='features are not those of the source'):
        run(src, tmp_path / 'out.safetensors', '--family', 'deit', '--check')
    assert not (tmp_path / 'out.safetensors').exists()


def test_nothing_is_overwritten(run, src, tmp_path, capsys):
    out = tmp_path / 'out.safetensors'
    out.write_text('precious')
    with pytest.raises(SystemExit):
        run(src, out, '--family', 'deit')
    assert 'nothing is overwritten' in capsys.readouterr().err and out.read_text() == 'precious'
    converted = convert(original('timm', 'deit')[0], 'deit')
    with pytest.raises(FileExistsError):  # nor if it appears in the meantime
        write(converted, out, metadata(converted, 'x', ''))
    assert out.read_text() == 'precious'


@pytest.mark.parametrize(('arguments', 'message'), [
    (['out.pth'], r'the result is a \.safetensors file'), (['o.safetensors', '--family', 'vit'], 'invalid choice'),
    (['o.safetensors', '--img-size', '1', '2', '3'], 'one or two numbers, not 3'),
    (['o.safetensors', '--patch-size', '0'], '--patch-size must be positive')])
def test_bad_arguments(run, src, arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(src, *arguments)
    assert re.search(message, capsys.readouterr().err)


def test_bad_files_are_named(run, src, tmp_path):
    (tmp_path / 'cut.safetensors').write_bytes(src.read_bytes()[:5000])
    (tmp_path / 'page.pth').write_text('<html>404</html>')
    torch.save({'conv1.weight': torch.ones(3)}, tmp_path / 'resnet.pth')
    for name, message in (('cut.safetensors', 'truncated'), ('page.pth', 'not a checkpoint'),
                          ('absent.pth', 'no checkpoint'), ('resnet.pth', 'no known source'),
                          (src.name, 'choose with --family')):
        with pytest.raises(SystemExit, match=f'{name}(?s:.*){message}'):
            run(tmp_path / name, tmp_path / 'out.safetensors')
    assert not (tmp_path / 'out.safetensors').exists()


def test_a_file_with_more_than_tensors_needs_trust(run, tmp_path):
    path, out = tmp_path / 'src.pth', tmp_path / 'out.safetensors'
    torch.save({'model': original('timm', 'deit')[0], 'args': argparse.Namespace(lr=1)}, path)
    with pytest.raises(SystemExit, match='--trust-checkpoint'):
        run(path, out, '--family', 'deit')
    assert not out.exists()
    assert '| loaded | 30 | timm |' in run(path, out, '--family', 'deit', '--trust-checkpoint')


def test_a_name_of_timm(run, tmp_path, monkeypatch):
    path = tmp_path / 'model.safetensors'
    save_file(randomise(timm.create_model('vit_tiny_patch16_224')).state_dict(), path)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda repo, file: str(path))
    name = 'vit_tiny_patch16_224.augreg_in21k_ft_in1k'
    out = tmp_path / 'out.safetensors'
    printed = run(f'timm://{name}', out, '--check')
    assert f'from timm {timm.__version__} {name} ' in printed
    with safe_open(out, 'pt') as file:
        notes = file.metadata()
    assert notes['family'] == 'augreg' and notes['licence'] == 'apache-2.0 (timm)'
    assert notes['source'] == f'timm: {name}'


@torch.no_grad()
def test_deit_tiny_and_its_head_classify_as_timm(run, shared_data, tmp_path):
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config
    path, out = shared_data / 'weights/deit_tiny_patch16_224.safetensors', tmp_path / 'deit.safetensors'
    printed = run(path, out, '--family', 'deit', '--check')
    assert float(re.search(r'at most (\S+) from timm', printed)[1]) < 1e-4
    theirs = timm.create_model('deit_tiny_patch16_224').eval()
    theirs.load_state_dict(load_file(path))
    model = MODELS.build({'type': 'adala_mm.AdaLAViT', 'embed_dim': 192, 'num_heads': 3, 'attention': SOFTMAX,
                          'out_type': 'cls_token', 'init_cfg': {'type': 'Pretrained', 'checkpoint': str(out)}})
    model.init_weights()
    model.eval()
    transform = create_transform(**resolve_model_data_config(theirs))
    pictures = sorted((shared_data / 'coco_permissive53').rglob('*.jpg'))
    assert len(pictures) > 40
    images = torch.stack([transform(Image.open(picture).convert('RGB')) for picture in pictures])
    classes, wanted = theirs.head(model(images)[0]), theirs(images)
    assert (classes.argmax(1) == wanted.argmax(1)).all() and len(wanted.argmax(1).unique()) > 10
    assert (classes - wanted).abs().max() < 1e-4
