"""Weights of timm's VisionTransformer, a local file or ``timm://NAME``: its names are ours."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.layers import SwiGLU, get_act_layer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adala_mm.conversion.families import FAMILIES
from adala_mm.conversion.source import Converted, Source
from adala_mm.utils.timm_models import on_meta

PLAIN = tuple(name for name, row in FAMILIES.items() if not row.rotary)  # those of VisionTransformer
ACTIVATIONS = {'GELU': 'gelu', 'GELUTanh': 'gelu_tanh', 'QuickGELU': 'quick_gelu'}


def facts(name: str) -> dict[str, Any] | None:
    """What timm itself says of its model ``name``; None if it knows none, or another architecture.

    Of a gated MLP the activation is that of `AdaLAViT`, which has no other there.
    """
    model = on_meta(name)
    if not isinstance(model, (VisionTransformer, Eva)):
        return None
    cfg, block = model.pretrained_cfg, model.blocks[0]
    act = type(block.mlp.act).__name__
    return {'name': name, 'act': 'gelu' if isinstance(block.mlp, SwiGLU) else ACTIVATIONS.get(act, act),
            'norm_eps': block.norm1.eps,
            'num_heads': block.attn.num_heads, 'licence': cfg.get('license'),
            'notes': ' '.join(cfg.get('notes') or ()).lower(),
            'normalise': tuple(tuple(255 * value for value in cfg[part]) for part in ('mean', 'std'))}


def timm_vit(converted: Converted, num_classes: int = 0, global_pool: str = '') -> VisionTransformer:
    """timm's ViT of the same structure and native size; images of other sizes may come.

    Args:
        num_classes: of a linear head, 0 for none.
        global_pool: of normalised tokens, ``token`` or ``avg`` (over patches) before a head, or empty for none.
    """
    family = converted.family
    return VisionTransformer(
        **size(converted), num_classes=num_classes, global_pool=global_pool, fc_norm=False,
        class_token=family.class_token, reg_tokens=converted.config.get('num_registers', 0),
        no_embed_class=family.no_embed_class, pre_norm=family.pre_norm, init_values=family.layer_scale,
        act_layer=get_act_layer(family.act))


def size(converted: Converted) -> dict[str, Any]:
    """What all of timm's ViTs are told of size and norms."""
    own = {key: converted.config[key] for key in ('img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads')}
    return own | {'mlp_ratio': converted.config.get('mlp_ratio', 4.0), 'dynamic_img_size': True,
                  'norm_layer': partial(nn.LayerNorm, eps=converted.family.norm_eps)}


def load_trunk(model: VisionTransformer, state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Final tokens of timm's ``model`` with all the weights that it has of ``state``."""
    model.load_state_dict({key: state[key].float() for key in model.state_dict() if key in state})
    return model.eval().forward_features


def reference(converted: Converted, state: dict[str, Tensor], name: str | None):
    """timm's own model of that name, or a ViT of the same structure for a file of an unknown one."""
    if name is None or facts(name) is None:
        model = (VisionTransformerDistilled(**size(converted), num_classes=0) if 'dist_token' in state else
                 timm_vit(converted))
        return f'timm {timm.__version__} {type(model).__name__}', load_trunk(model, state)
    return f'timm {timm.__version__} {name}', load_trunk(timm.create_model(name, dynamic_img_size=True), state)


TIMM = Source(
    name='timm',
    prefixes=('',),
    mark=lambda keys: ({'patch_embed.proj.weight', 'blocks.0.norm1.weight'} <= keys
                       and not keys & {'mask_token', 'register_tokens', 'storage_tokens', 'blocks.0.gamma_1'}),
    rename={key: key for key in (
        'cls_token', 'reg_token', 'dist_token', 'pos_embed', 'patch_embed.proj.*', 'norm_pre.*', 'norm.*',
        'blocks.#.norm1.*', 'blocks.#.norm2.*', 'blocks.#.attn.qkv.*', 'blocks.#.attn.proj.*', 'blocks.#.mlp.fc1.*',
        'blocks.#.mlp.fc2.*', 'blocks.#.ls1.gamma', 'blocks.#.ls2.gamma')},
    drop={**dict.fromkeys(('head.*', 'head_dist.*', 'pre_logits.**'), 'classifier or projection'),
          'fc_norm.*': 'norm of pooled features', 'attn_pool.**': 'attention pooling'},
    families=PLAIN,
    any_size=PLAIN,
    reference=reference)
