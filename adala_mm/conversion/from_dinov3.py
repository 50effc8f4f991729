"""Weights of DINOv3, which has rotary positions: official, of timm's Eva, and of transformers."""
from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor

from adala_mm.conversion.from_timm import TIMM, load_trunk, size
from adala_mm.conversion.from_transformers import below_prefix
from adala_mm.conversion.source import Converted, Source
from adala_mm.ops import RotaryPositions

# Heads by (width, width of the MLP) where DINOv3 has others than most ViTs.
HEADS = {(1280, 5120): 20, (4096, 8192): 32}
NATIVE = 256  # pixels of a side that timm takes: no weight shows any
FAMILIES = ('dinov3', 'dinov3_sat')
MLP = {'mlp.fc1.*': 'mlp.fc1.*', 'mlp.fc2.*': 'mlp.fc2.*', 'mlp.w1.*': 'mlp.fc1_g.*', 'mlp.w2.*': 'mlp.fc1_x.*',
       'mlp.w3.*': 'mlp.fc2.*'}
OWN = {key: key for key in TIMM.rename if key not in ('reg_token', 'pos_embed', 'norm_pre.*') and '.mlp.' not in key}


def check_periods(state: dict[str, Tensor], head_dim: int) -> None:
    """Raises ValueError if the wave lengths that official files hold, in bfloat16, are not those of `AdaLAViT`."""
    for key in [key for key in state if key.endswith('rope_embed.periods')]:
        found, base = state[key].double(), RotaryPositions(head_dim).base
        wanted = base ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float64)
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=2 ** -8, atol=0):
            raise ValueError(f'{key} has {found.numel()} wave lengths from {found.min():.4g} to {found.max():.4g}, and '
                             f'DINOv3 of {head_dim} channels in a head has {wanted.numel()} from 1 to '
                             f'{wanted.max():.4g}: is --num-heads right?')


def eva(converted: Converted) -> Eva:
    """timm's model of the same structure, for images of any size."""
    config = converted.config
    return Eva(**size(converted), num_classes=0, qkv_bias=config['qkv_bias'], swiglu_mlp=config.get('swiglu', False),
               swiglu_align_to=config.get('swiglu_align_to', 8), init_values=converted.family.layer_scale,
               num_reg_tokens=config['num_registers'], use_rot_pos_emb=True, use_abs_pos_emb=False,
               rope_type='dinov3', rope_temperature=100, rope_rotate_half=True, use_fc_norm=False)


def converted_in_timm(converted: Converted) -> Callable[[Tensor], Tensor]:
    """Final tokens of `eva` with the weights that have been converted."""
    state = {key.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2'): value
             for key, value in converted.state.items()}
    for key in [key for key in state if key.endswith('qkv.bias')]:
        q, _, v = state.pop(key).chunk(3)
        state |= {key.replace('qkv.bias', 'q_bias'): q, key.replace('qkv.bias', 'v_bias'): v}
    return load_trunk(eva(converted), state)


def timm_reference(converted: Converted, state: dict[str, Tensor], name: str | None):
    """timm's own model of that name, or one of the same structure."""
    model = eva(converted) if name is None else timm.create_model(name, dynamic_img_size=True)
    return f'timm {timm.__version__} {name or "Eva"}', load_trunk(model, state)


def official_reference(converted: Converted, state: dict[str, Tensor], name: str | None):
    """timm's model with the weights as timm's own code converts them: the official code is no package."""
    model = eva(converted)
    return (f'timm {timm.__version__} by its own conversion, as the official code is no package',
            load_trunk(model, checkpoint_filter_fn(dict(state), model)))


def transformers_reference(converted: Converted, state: dict[str, Tensor], name: str | None):
    """``DINOv3ViTModel`` with the weights of the file."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    config, own = converted.config, below_prefix(converted, state)
    gated = config.get('swiglu', False)
    biased = any(key.endswith('q_proj.bias') for key in own)
    model, info = transformers.DINOv3ViTModel.from_pretrained(
        None, state_dict=own, output_loading_info=True, attn_implementation='sdpa',
        config=transformers.DINOv3ViTConfig(
            hidden_size=config['embed_dim'], intermediate_size=converted.state['blocks.0.mlp.fc2.weight'].shape[1],
            num_hidden_layers=config['depth'], num_attention_heads=config['num_heads'], use_gated_mlp=gated,
            hidden_act='silu' if gated else 'gelu', image_size=NATIVE, patch_size=config['patch_size'],
            layer_norm_eps=converted.family.norm_eps, num_register_tokens=config['num_registers'],
            query_bias=biased, value_bias=biased))
    if info['missing_keys'] or info['mismatched_keys'] or info['unexpected_keys']:
        raise ValueError(f'transformers does not load these weights: {info}')
    model.eval()
    return (f'transformers {transformers.__version__} {type(model).__name__}',
            lambda image: model(pixel_values=image).last_hidden_state)


TIMM_DINOV3 = Source(
    name='timm, DINOv3',
    prefixes=('',),
    mark=lambda keys: {'patch_embed.proj.weight', 'reg_token', 'blocks.0.gamma_1'} <= keys and 'pos_embed' not in keys,
    rename={**{key: key for key in OWN if '.ls' not in key}, 'reg_token': 'reg_token',
            'blocks.#.attn.q_bias': 'blocks.#.attn.q.bias', 'blocks.#.attn.v_bias': 'blocks.#.attn.v.bias',
            'blocks.#.gamma_1': 'blocks.#.ls1.gamma', 'blocks.#.gamma_2': 'blocks.#.ls2.gamma',
            **{f'blocks.#.mlp.{key}.*': f'blocks.#.mlp.{key}.*' for key in ('fc1', 'fc1_g', 'fc1_x', 'fc2')}},
    drop={'head.*': 'classifier or projection'},
    families=FAMILIES,
    any_size=FAMILIES,
    key_bias=False,
    reference=timm_reference)

DINOV3 = Source(
    name='official DINOv3',
    prefixes=('',),
    mark=lambda keys: 'patch_embed.proj.weight' in keys and bool(keys & {'storage_tokens', 'rope_embed.periods'}),
    rename={**OWN, 'storage_tokens': 'reg_token',
            **{f'blocks.#.{key}': f'blocks.#.{ours}' for key, ours in MLP.items()}},
    drop={'mask_token': 'mask token, for pretraining only', 'local_cls_norm.*': 'norm for pretraining only',
          'rope_embed.periods': 'wave lengths, which are computed',
          'blocks.#.attn.qkv.bias_mask': 'mask of the biases of keys, which are zero'},
    families=FAMILIES,
    any_size=FAMILIES,
    key_bias=False,
    reference=official_reference)

IN_BLOCK = {'norm1.*': 'norm1.*', 'norm2.*': 'norm2.*', 'layer_scale1.lambda1': 'ls1.gamma',
            'layer_scale2.lambda1': 'ls2.gamma', 'attention.q_proj.*': 'attn.q.*', 'attention.k_proj.*': 'attn.k.*',
            'attention.v_proj.*': 'attn.v.*', 'attention.o_proj.*': 'attn.proj.*', 'mlp.down_proj.*': 'mlp.fc2.*'}


def _transformers(name: str, gated: bool) -> Source:
    """``up_proj`` is another layer where there is a gate."""
    mlp = {'mlp.gate_proj.*': 'mlp.fc1_g.*', 'mlp.up_proj.*': 'mlp.fc1_x.*'} if gated else {'mlp.up_proj.*':
                                                                                           'mlp.fc1.*'}
    return Source(
        name=name,
        prefixes=('', 'dinov3_vit.'),
        mark=lambda keys: ({'embeddings.register_tokens', 'embeddings.patch_embeddings.weight'} <= keys and gated
                           == any('.mlp.gate_proj.' in key for key in keys)),
        rename={'embeddings.cls_token': 'cls_token', 'embeddings.register_tokens': 'reg_token',
                'embeddings.patch_embeddings.*': 'patch_embed.proj.*', 'norm.*': 'norm.*',
                **{f'{start}layer.#.{theirs}': f'blocks.#.{ours}' for start in ('', 'model.')  # transformers 5: model
                   for theirs, ours in (IN_BLOCK | mlp).items()}},
        drop={'embeddings.mask_token': 'mask token, for pretraining only'},
        outside={'classifier.*': 'classifier or projection'},
        families=FAMILIES,
        any_size=FAMILIES,
        key_bias=False,
        reference=transformers_reference)


TRANSFORMERS_DINOV3 = _transformers('transformers, DINOv3', gated=False)
TRANSFORMERS_DINOV3_PLUS = _transformers('transformers, DINOv3 with SwiGLU', gated=True)
DINOV3_SOURCES = (TIMM_DINOV3, DINOV3, TRANSFORMERS_DINOV3, TRANSFORMERS_DINOV3_PLUS)
