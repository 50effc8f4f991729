"""Official weights of DINOv2 (facebookresearch), with and without registers, chunked blocks too."""
from __future__ import annotations

import re

import timm
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from adala_mm.conversion.from_timm import TIMM, load_trunk, timm_vit
from adala_mm.conversion.source import Converted, Source

OWN = {key: ours for key, ours in TIMM.rename.items() if key not in ('reg_token', 'dist_token', 'norm_pre.*')}
CHUNKED = re.compile(r'blocks\.\d+\.(?=\d+\.)')  # the second number counts through all chunks


def reference(converted: Converted, state: dict[str, Tensor], name: str | None):
    """timm's ViT with the weights as timm's own code converts them: the official code is no package."""
    model = timm_vit(converted)
    whole = {'mask_token': None} | {CHUNKED.sub('blocks.', key): value for key, value in state.items()}
    return (f'timm {timm.__version__} by its own conversion, as the official code is no package',
            load_trunk(model, checkpoint_filter_fn(whole, model)))


DINOV2 = Source(
    name='official DINOv2',
    prefixes=('',),
    mark=lambda keys: ('patch_embed.proj.weight' in keys and not keys & {'storage_tokens', 'rope_embed.periods'}
                       and bool(keys & {'mask_token', 'register_tokens', 'blocks.0.0.norm1.weight'})),
    rename={'register_tokens': 'reg_token', **OWN,
            **{key.replace('blocks.#', 'blocks.@.#'): ours for key, ours in OWN.items() if key.startswith('blocks')}},
    drop={'mask_token': 'mask token, for pretraining only'},
    families=('dinov2', 'dinov2_reg'),
    any_size=('dinov2', 'dinov2_reg'),
    reference=reference)
