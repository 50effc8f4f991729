"""Converted weights give the features of the libraries that they come from, at other sizes too."""
from __future__ import annotations

import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from adala_mm.conversion import compare, convert, resample
from helpers.sources import (
    BY_NAME,
    GRID,
    OFFICIAL,
    WIDTH,
    difference,
    every_pair,
    mmpretrain_model,
    official_dinov2,
    openai_clip,
    original,
    ours,
    patch_of,
    transformers_model,
    vision_tower,
)


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
