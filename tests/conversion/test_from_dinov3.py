"""Weights of DINOv3: the official files, and those of timm and transformers."""
from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from adala_mm.conversion import compare, convert
from adala_mm.conversion.convert import choose_family
from adala_mm.conversion.from_timm import facts
from helpers.sources import (
    BY_NAME,
    DEPTH,
    HEADS,
    WIDTH,
    difference,
    eva,
    official_dinov3,
    original,
    ours,
    transformers_dinov3,
)


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


@pytest.mark.parametrize('family', [None, 'openclip'])
@pytest.mark.parametrize(('name', 'source', 'weights'), [
    ('vit_pe_core_tiny_patch16_384', 'timm', 'openclip'), ('vit_pe_spatial_tiny_patch16_512', 'timm', 'openclip'),
    ('vit_medium_patch16_rope_reg1_gap_256', 'timm, DINOv3', 'dinov3')])
def test_a_name_of_timm_with_other_rotary_positions_is_refused(name, source, weights, family):
    with pytest.raises(ValueError, match=f'^{name} has rotary positions of another kind.*Cat.*linearize'):
        convert(original(source, weights)[0], family, name=name)


@pytest.mark.parametrize('gated', [False, True])
def test_a_classifier_on_dinov3_of_transformers(gated):
    inside = {f'dinov3_vit.{key}': value for key, value in transformers_dinov3(gated).state_dict().items()}
    state = inside | {'classifier.weight': torch.ones(5, WIDTH), 'classifier.bias': torch.ones(5)}
    converted = convert(state)
    assert ('dropped', 2, 'classifier or projection: classifier.weight, classifier.bias') in converted.report
    assert compare(converted, state, torch.randn(1, 3, 64, 64))[1] < 1e-4
