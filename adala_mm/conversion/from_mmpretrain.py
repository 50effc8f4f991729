"""Weights of mmpretrain's VisionTransformer: plain, with LayerScale (DINOv2) or with a norm in front (CLIP)."""
from __future__ import annotations

from torch import Tensor

from adala_mm.conversion.source import Converted, Source
from adala_mm.utils.mmpretrain_compat import tolerate_transformers_5

ACTIVATIONS = {'gelu': 'GELU', 'quick_gelu': 'mmpretrain.QuickGELU'}


def reference(converted: Converted, state: dict[str, Tensor], name: str | None):
    """mmpretrain's backbone, built from its registry; raises ImportError without it."""
    tolerate_transformers_5()
    import mmpretrain
    from mmpretrain.registry import MODELS
    config, family = converted.config, converted.family
    width = config['embed_dim']
    model = MODELS.build(dict(
        type='mmpretrain.VisionTransformer', img_size=config['img_size'], patch_size=config['patch_size'],
        arch=dict(embed_dims=width, num_layers=config['depth'], num_heads=config['num_heads'],
                  feedforward_channels=int(width * config.get('mlp_ratio', 4.0))),
        norm_cfg=dict(type='LN', eps=family.norm_eps), layer_scale_init_value=family.layer_scale or 0.0,
        layer_cfgs=dict(act_cfg=dict(type=ACTIVATIONS[family.act])), pre_norm=family.pre_norm, out_type='raw'))
    model.load_state_dict({key: state[converted.prefix + key].float() for key in model.state_dict()
                           if converted.prefix + key in state})
    model.eval()
    return f'mmpretrain {mmpretrain.__version__} VisionTransformer', lambda image: model(image)[0]


MMPRETRAIN = Source(
    name='mmpretrain',
    prefixes=('', 'backbone.', 'visual.'),
    mark=lambda keys: {'patch_embed.projection.weight', 'layers.0.ln1.weight'} <= keys,
    rename={
        'cls_token': 'cls_token',
        'pos_embed': 'pos_embed',
        'patch_embed.projection.*': 'patch_embed.proj.*',
        'pre_norm.*': 'norm_pre.*',
        'ln1.*': 'norm.*',
        **{f'layers.#.{theirs}': f'blocks.#.{ours}' for theirs, ours in {
            'ln1.*': 'norm1.*', 'ln2.*': 'norm2.*', 'attn.qkv.*': 'attn.qkv.*', 'attn.proj.*': 'attn.proj.*',
            'attn.gamma1.weight': 'ls1.gamma', 'ffn.layers.0.0.*': 'mlp.fc1.*', 'ffn.layers.1.*': 'mlp.fc2.*',
            'ffn.gamma2.weight': 'ls2.gamma'}.items()}},
    drop={'ln2.*': 'norm of pooled features', 'mask_token': 'mask token, for pretraining only'},
    outside={
        **dict.fromkeys(('head.**', 'neck.**', 'data_preprocessor.**'), 'classifier or projection'),
        **dict.fromkeys(('transformer.**', 'token_embedding.weight', 'positional_embedding', 'ln_final.*',
                         'text_projection', 'text_prototype_embeds'), 'text tower'),
        'visual_proj.**': 'projection to the space of text', 'logit_scale': 'scale of the contrastive loss'},
    families=('augreg', 'deit', 'dinov2', 'clip_openai', 'openclip', 'openclip_quickgelu', 'openclip_half'),
    reference=reference)
