"""Tiny models of the libraries that weights are converted from, and their checkpoints."""
from __future__ import annotations

import re
from functools import cache, partial, reduce

import pytest
import torch
from timm import create_model
from timm.layers import get_act_layer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from adala_mm.conversion import FAMILIES, SOURCES
from adala_mm.registry import MODELS

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
