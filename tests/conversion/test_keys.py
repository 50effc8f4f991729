"""Every key of a checkpoint is accounted for, and nothing is guessed."""
from __future__ import annotations

import re

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from adala_mm import linearize
from adala_mm.conversion import convert
from helpers.sources import (
    BY_NAME,
    WIDTH,
    every_pair,
    official_dinov2,
    openai_clip,
    original,
    timm_model,
    transformers_model,
)


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
