"""Which pretrained model a checkpoint is of: asked for where the checkpoint does not tell."""
from __future__ import annotations

import re

import pytest
from mmengine.config import Config

from adala_mm.conversion import FAMILIES, SOURCES, convert
from adala_mm.conversion.convert import choose_family
from adala_mm.conversion.from_timm import TIMM, facts
from helpers import ROOT
from helpers.sources import GRID, PAIRS, original, transformers_model


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


def test_a_family_that_the_source_has_not_is_no_way_out():
    with pytest.raises(ValueError, match='no class token.*is of no known family of transformers, ViT'):
        convert(transformers_model('deit', 'IJepa').state_dict(), 'siglip')


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
