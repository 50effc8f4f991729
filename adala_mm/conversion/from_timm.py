"""Weights of timm's VisionTransformer, a local file or ``timm://NAME``: our own names."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import get_act_layer, get_norm_layer
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from adala_mm.conversion.families import FAMILIES
from adala_mm.conversion.source import Source

ACTIVATIONS = {'GELU': 'gelu', 'GELUTanh': 'gelu_tanh', 'QuickGELU': 'quick_gelu'}
SAME = ['cls_token', 'reg_token', 'pos_embed', 'patch_embed.proj.*', 'norm_pre.*', 'norm.*', 'blocks.#.norm1.*',
        'blocks.#.norm2.*', 'blocks.#.attn.qkv.*', 'blocks.#.attn.proj.*', 'blocks.#.mlp.fc1.*', 'blocks.#.mlp.fc2.*',
        'blocks.#.ls1.gamma', 'blocks.#.ls2.gamma']


def facts(name: str) -> dict[str, Any] | None:
    """What timm itself says of its model ``name``; None if it knows none, or another architecture."""
    try:
        with torch.device('meta'):
            model = timm.create_model(name)
    except (RuntimeError, ValueError):
        return None
    if not isinstance(model, VisionTransformer):
        return None
    cfg, block = model.pretrained_cfg, model.blocks[0]
    return {'act': ACTIVATIONS.get(type(block.mlp.act).__name__, type(block.mlp.act).__name__),
            'norm_eps': block.norm1.eps, 'num_heads': block.attn.num_heads, 'licence': cfg.get('license'),
            'normalise': tuple(tuple(255 * value for value in cfg[part]) for part in ('mean', 'std'))}


def build(converted) -> VisionTransformer:
    """timm's ViT of the same structure, at native size and without a head."""
    config, family = converted.config, converted.family
    return VisionTransformer(
        img_size=config['img_size'], patch_size=config['patch_size'], embed_dim=config['embed_dim'],
        depth=config['depth'], num_heads=config['num_heads'], mlp_ratio=config.get('mlp_ratio', 4.0), num_classes=0,
        global_pool='', class_token=family.class_token, reg_tokens=config.get('num_registers', 0),
        no_embed_class=family.no_embed_class, pre_norm=family.pre_norm, init_values=family.layer_scale,
        norm_layer=get_norm_layer('layernorm', eps=family.norm_eps) if False else _norm(family.norm_eps),
        act_layer=get_act_layer(family.act), dynamic_img_size=True).eval()
