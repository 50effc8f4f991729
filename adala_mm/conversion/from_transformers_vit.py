"""Weights of transformers' ViT, DeiT (distilled) and ViTMAE, and of classifiers on them, which share their names."""
from __future__ import annotations

import torch
from torch import Tensor

from adala_mm.conversion.from_transformers import below_prefix, build
from adala_mm.conversion.source import Converted, Source


def reference(converted: Converted, state: dict[str, Tensor], name: str | None):
    """transformers' own encoder, what it is, and its final tokens; that of MAE masks nothing and keeps the order."""
    import transformers
    config, own = converted.config, {key: value for key, value in below_prefix(converted, state).items()
                                     if converted.source.our_key(key)}  # no pooler
    extra = {'intermediate_size': int(config['embed_dim'] * config.get('mlp_ratio', 4.0))}
    if converted.family_name == 'mae':
        kind, model = 'ViTMAE', build('ViTMAE', converted, own, extra | {'mask_ratio': 0.0})
    else:
        kind = 'DeiT' if converted.family_name == 'deit_distilled' else 'ViT'
        model = build(kind, converted, own, extra, add_pooling_layer=False)
    order = torch.arange(converted.grid[0] * converted.grid[1]).float()  # patches are sorted by it

    def tokens(image: Tensor) -> Tensor:
        options = {'noise': order.expand(len(image), -1)} if kind == 'ViTMAE' else {}
        return model(pixel_values=image, **options).last_hidden_state

    return f'transformers {transformers.__version__} {kind}Model', tokens


# As files have it, and as transformers 5 has it in memory.
BLOCK = {'layernorm_before.*': 'norm1.*', 'layernorm_after.*': 'norm2.*',
         'attention.attention.query.*': 'attn.q.*', 'attention.q_proj.*': 'attn.q.*',
         'attention.attention.key.*': 'attn.k.*', 'attention.k_proj.*': 'attn.k.*',
         'attention.attention.value.*': 'attn.v.*', 'attention.v_proj.*': 'attn.v.*',
         'attention.output.dense.*': 'attn.proj.*', 'attention.o_proj.*': 'attn.proj.*',
         'intermediate.dense.*': 'mlp.fc1.*', 'mlp.fc1.*': 'mlp.fc1.*',
         'output.dense.*': 'mlp.fc2.*', 'mlp.fc2.*': 'mlp.fc2.*'}

TRANSFORMERS_VIT = Source(
    name='transformers, ViT, DeiT and MAE',
    prefixes=('', 'vit.', 'deit.'),
    mark=lambda keys: ('embeddings.patch_embeddings.projection.weight' in keys and bool(
        keys & {'encoder.layer.0.layernorm_before.weight', 'layers.0.layernorm_before.weight'})),
    rename={
        'embeddings.cls_token': 'cls_token',
        'embeddings.distillation_token': 'dist_token',
        'embeddings.position_embeddings': 'pos_embed',
        'embeddings.patch_embeddings.projection.*': 'patch_embed.proj.*',
        'layernorm.*': 'norm.*',
        **{f'{stack}.#.{theirs}': f'blocks.#.{ours}' for stack in ('encoder.layer', 'layers')
           for theirs, ours in BLOCK.items()}},
    drop={'pooler.dense.*': 'pooler of the class token', 'embeddings.mask_token': 'mask token, for pretraining only'},
    outside={
        **dict.fromkeys(('classifier.*', 'cls_classifier.*', 'distillation_classifier.*'), 'classifier or projection'),
        'decoder.**': 'decoder, for pretraining only'},
    families=('augreg', 'deit', 'deit_distilled', 'mae'),
    norm_eps=1e-12,  # of its published ViT, DeiT and MAE, which were trained with 1e-6
    reference=reference)
