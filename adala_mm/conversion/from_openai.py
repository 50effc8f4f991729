"""Weights of OpenAI's CLIP and of OpenCLIP, which share their names: the whole model or its ``visual`` tower."""
from __future__ import annotations

import timm
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from adala_mm.conversion.from_timm import load_trunk, timm_vit
from adala_mm.conversion.source import Converted, Source


def reference(converted: Converted, state: dict[str, Tensor], name: str | None):
    """timm's ViT with the weights as timm's own code converts them."""
    model = timm_vit(converted)
    tower = {f'visual.{key.removeprefix(converted.prefix)}': value for key, value in state.items()
             if key.startswith(converted.prefix)}
    return f'timm {timm.__version__} by its own conversion', load_trunk(model, checkpoint_filter_fn(tower, model))


OPENAI = Source(
    name='OpenAI / OpenCLIP',
    prefixes=('', 'visual.'),
    mark=lambda keys: {'conv1.weight', 'class_embedding'} <= keys,
    rename={
        'class_embedding': 'cls_token',
        'positional_embedding': 'pos_embed',
        'conv1.weight': 'patch_embed.proj.weight',
        'ln_pre.*': 'norm_pre.*',
        'ln_post.*': 'norm.*',
        'transformer.resblocks.#.ln_1.*': 'blocks.#.norm1.*',
        'transformer.resblocks.#.attn.in_proj_*': 'blocks.#.attn.qkv.*',
        'transformer.resblocks.#.attn.out_proj.*': 'blocks.#.attn.proj.*',
        'transformer.resblocks.#.ln_2.*': 'blocks.#.norm2.*',
        'transformer.resblocks.#.mlp.c_fc.*': 'blocks.#.mlp.fc1.*',
        'transformer.resblocks.#.mlp.c_proj.*': 'blocks.#.mlp.fc2.*'},
    drop={'proj': 'projection to the space of text'},
    outside={
        **dict.fromkeys(('transformer.**', 'text.**', 'token_embedding.weight', 'positional_embedding', 'ln_final.*',
                         'text_projection', 'attn_mask'), 'text tower'),
        **dict.fromkeys(('logit_scale', 'logit_bias'), 'scale of the contrastive loss'),
        **dict.fromkeys(('input_resolution', 'context_length', 'vocab_size'), 'number about the model')},
    families=('clip_openai', 'openclip', 'openclip_quickgelu', 'openclip_half'),
    any_size=('clip_openai', 'openclip', 'openclip_quickgelu', 'openclip_half'),
    reference=reference)
