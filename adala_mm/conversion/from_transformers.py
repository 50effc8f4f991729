"""Weights of Hugging Face transformers: DINOv2 with and without registers, CLIP, SigLIP and SigLIP 2."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.conversion.source import Converted, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATIONS = {'gelu': 'gelu', 'quick_gelu': 'quick_gelu', 'gelu_tanh': 'gelu_pytorch_tanh'}
CLASSES = {'dinov2': 'Dinov2', 'dinov2_reg': 'Dinov2WithRegisters', 'siglip': 'SiglipVision',
           'siglip_tanh': 'SiglipVision'}  # all others are CLIPVision


def pretrained(converted: Converted, state: dict[str, Tensor]) -> PreTrainedModel:
    """The model of transformers with the weights; raises as `build`."""
    config, family = converted.config, converted.family
    own = in_files({key: value for key, value in below_prefix(converted, state).items()
                    if not key.endswith('position_ids')})
    mlp_ratio = config.get('mlp_ratio', 4.0)
    if family.layer_scale is None:
        extra = {'intermediate_size': int(config['embed_dim'] * mlp_ratio)}
    else:
        extra = {'mlp_ratio': mlp_ratio if mlp_ratio % 1 else int(mlp_ratio)}
    if family.registers:
        extra['num_register_tokens'] = config['num_registers']
        own.setdefault('embeddings.mask_token', own['embeddings.cls_token'][:, 0])  # never used, always wanted
    elif family.layer_scale is not None:
        extra['use_mask_token'] = 'embeddings.mask_token' in own
    elif not family.class_token:
        extra['vision_use_head'] = 'vision_model.head.probe' in own
    kind = CLASSES.get(converted.family_name, 'CLIPVision')
    if own.get('vision_model.embeddings.patch_embedding.weight', torch.empty(0)).ndim == 2:
        kind, extra['num_patches'] = 'Siglip2Vision', converted.grid[0] * converted.grid[1]
    return build(kind, converted, own, extra)


def below_prefix(converted: Converted, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the ViT alone, in float32, without the prefix of their keys."""
    return {key.removeprefix(converted.prefix): value.float() for key, value in state.items()
            if key.startswith(converted.prefix)}


def build(kind: str, converted: Converted, own: dict[str, Tensor], extra: dict[str, Any],
          **options: Any) -> PreTrainedModel:
    """transformers' ``{kind}Model`` of the structure of ``converted``, with the weights ``own``.

    Args:
        extra: arguments of ``{kind}Config`` beside those that all have.
        options: arguments of ``{kind}Model``.

    Raises:
        ImportError: without transformers.
        ValueError: for a grid that is not square, and for weights that it does not load.
    """
    import transformers
    transformers.utils.logging.disable_progress_bar()
    config, family = converted.config, converted.family
    if not isinstance(config['img_size'], int):
        raise ValueError('transformers has ViTs for square images only: there is nothing to compare with')
    model, info = getattr(transformers, f'{kind}Model').from_pretrained(
        None, state_dict=own, output_loading_info=True, attn_implementation='sdpa', **options,
        config=getattr(transformers, f'{kind}Config')(
            hidden_size=config['embed_dim'], num_hidden_layers=config['depth'],
            num_attention_heads=config['num_heads'], image_size=config['img_size'], patch_size=config['patch_size'],
            hidden_act=ACTIVATIONS[family.act], layer_norm_eps=family.norm_eps, **extra))
    if info['missing_keys'] or info['mismatched_keys']:
        raise ValueError(f'transformers does not load these weights: {info}')
    return model.eval()


def in_files(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys that files have, and that both transformers 4 and 5 read: CLIP's and SigLIP's begin with the tower."""
    tower = 'vision_model.' if 'embeddings.patch_embedding.weight' in state else ''
    return {tower + key: value for key, value in state.items()}


def reference(converted: Converted, state: dict[str, Tensor], name: str | None):
    """`pretrained`, what it is, and its final tokens."""
    import transformers
    model = pretrained(converted, state)
    kind, patch = type(model).__name__, converted.config['patch_size']

    def tokens(image: Tensor) -> Tensor:
        if kind == 'Siglip2VisionModel':
            return model(**flattened(image, patch)).last_hidden_state
        final = model(pixel_values=image).last_hidden_state
        # CLIP's own normalises the class token only.
        return getattr(model, 'vision_model', model).post_layernorm(final) if kind == 'CLIPVisionModel' else final

    return f'transformers {transformers.__version__} {kind}', tokens


def flattened(image: Tensor, patch: int) -> dict[str, Tensor]:
    """Images (B, 3, H, W) as SigLIP 2 NaFlex takes them: patches (B, N, P * P * 3), a mask, and their grids."""
    batch, _, height, width = image.shape
    patches = F.unfold(image, patch, stride=patch)  # (B, 3 * P * P, N), channels first
    patches = patches.unflatten(1, (3, patch * patch)).permute(0, 3, 2, 1).flatten(2)
    return {'pixel_values': patches, 'pixel_attention_mask': torch.ones(patches.shape[:2], dtype=torch.long),
            'spatial_shapes': torch.tensor([[height // patch, width // patch]] * batch)}


BLOCK = {'norm1.*': 'norm1.*', 'norm2.*': 'norm2.*', 'mlp.fc1.*': 'mlp.fc1.*', 'mlp.fc2.*': 'mlp.fc2.*',
         'layer_scale1.lambda1': 'ls1.gamma', 'layer_scale2.lambda1': 'ls2.gamma',
         # as files have it, and as transformers 5 has it in memory
         'attention.attention.query.*': 'attn.q.*', 'attention.q_proj.*': 'attn.q.*',
         'attention.attention.key.*': 'attn.k.*', 'attention.k_proj.*': 'attn.k.*',
         'attention.attention.value.*': 'attn.v.*', 'attention.v_proj.*': 'attn.v.*',
         'attention.output.dense.*': 'attn.proj.*', 'attention.o_proj.*': 'attn.proj.*'}

TRANSFORMERS_DINOV2 = Source(
    name='transformers, DINOv2',
    prefixes=('', 'dinov2.', 'dinov2_with_registers.'),
    mark=lambda keys: {'embeddings.patch_embeddings.projection.weight', 'encoder.layer.0.norm1.weight'} <= keys,
    rename={
        'embeddings.cls_token': 'cls_token',
        'embeddings.register_tokens': 'reg_token',
        'embeddings.position_embeddings': 'pos_embed',
        'embeddings.patch_embeddings.projection.*': 'patch_embed.proj.*',
        'layernorm.*': 'norm.*',
        **{f'encoder.layer.#.{theirs}': f'blocks.#.{ours}' for theirs, ours in BLOCK.items()}},
    drop={'embeddings.mask_token': 'mask token, for pretraining only'},
    outside={'classifier.*': 'classifier or projection'},
    families=('dinov2', 'dinov2_reg'),
    any_size=('dinov2_reg',),  # without registers it interpolates without antialiasing
    reference=reference)

TRANSFORMERS_CLIP = Source(
    name='transformers, CLIP and SigLIP',
    prefixes=('', 'vision_model.'),
    mark=lambda keys: {'embeddings.patch_embedding.weight', 'embeddings.position_embedding.weight'} <= keys,
    rename={
        'embeddings.class_embedding': 'cls_token',
        'embeddings.position_embedding.weight': 'pos_embed',
        'embeddings.patch_embedding.*': 'patch_embed.proj.*',
        'pre_layrnorm.*': 'norm_pre.*',
        'post_layernorm.*': 'norm.*',
        **{f'encoder.layers.#.{theirs}': f'blocks.#.{ours}' for theirs, ours in {
            'layer_norm1.*': 'norm1.*', 'layer_norm2.*': 'norm2.*', 'mlp.fc1.*': 'mlp.fc1.*',
            'mlp.fc2.*': 'mlp.fc2.*', 'self_attn.q_proj.*': 'attn.q.*', 'self_attn.k_proj.*': 'attn.k.*',
            'self_attn.v_proj.*': 'attn.v.*', 'self_attn.out_proj.*': 'attn.proj.*'}.items()}},
    drop={'embeddings.position_ids': 'counter of positions', 'head.**': 'attention pooling'},
    outside={
        'text_model.**': 'text tower', 'text_projection.weight': 'text tower',
        'visual_projection.weight': 'projection to the space of text', 'classifier.*': 'classifier or projection',
        **dict.fromkeys(('logit_scale', 'logit_bias'), 'scale of the contrastive loss')},
    families=('clip_openai', 'openclip', 'openclip_quickgelu', 'openclip_half', 'siglip_tanh'),
    reference=reference)
