"""Tiny ViTs of every family that `linearize` takes."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from adala_mm.models.attentions import Attention
from adala_mm.models.attentions.softmax import SoftmaxAttention
from adala_mm.registry import MODELS
from helpers import LINEAR, tiny_vit


class Exact(SoftmaxAttention):
    """Softmax attention that passes for another one."""

    is_softmax = False


SIZES = ((32, 32), (24, 40))
# name: (what timm's ViT has, what ours has), beside what all have; None where ours has no such thing.
TIMM = {
    'augreg': ({}, {}),
    'no_class_token': (dict(class_token=False, global_pool='avg', fc_norm=False), dict(class_token=False)),
    'dinov2_reg4': (dict(init_values=1e-5, reg_tokens=4, no_embed_class=True),
                    dict(layer_scale=1e-5, num_registers=4, no_embed_class=True)),
    'clip': (dict(pre_norm=True, act_layer='quick_gelu', norm_layer=partial(nn.LayerNorm, eps=1e-5)),
             dict(pre_norm=True, act='quick_gelu', norm_eps=1e-5)),
    'siglip': (dict(class_token=False, global_pool='map'), dict(class_token=False)),
    'qk_norm': (dict(qk_norm=True), None),
    'norm_inside': (dict(scale_attn_norm=True), None),
}
EVA = {
    'dinov3': dict(use_rot_pos_emb=True, rope_type='dinov3', rope_rotate_half=True, use_abs_pos_emb=False,
                   num_reg_tokens=4, init_values=1e-5, qkv_bias=False),
    'eva02': dict(use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True),
    'mixed': dict(use_rot_pos_emb=True, rope_type='mixed', attn_type='rope', qk_norm=True, class_token=False,
                  global_pool='avg'),
    'eva': dict(),
}
MLP = dict(intermediate_size=64)
HF = {  # class of transformers, and what its config has beside what all have
    'hf_vit': ('ViTModel', MLP),
    'hf_deit': ('DeiTModel', MLP),
    'hf_dinov2': ('Dinov2Model', {}),
    'hf_dinov2_with_registers': ('Dinov2WithRegistersModel', {}),
    'hf_backbone': ('Dinov2WithRegistersBackbone', dict(out_features=['stage1', 'stage3'])),
    'hf_dinov3': ('DINOv3ViTModel', dict(num_register_tokens=4, pos_embed_rescale=None, **MLP)),
    'hf_clip': ('CLIPVisionModel', MLP),
    'hf_siglip': ('SiglipVisionModel', MLP),
    'hf_dpt': ('DPTModel', MLP),
}
FAMILIES = (*TIMM, *EVA, *HF, 'mmpretrain', 'mmpretrain_no_class', 'adala')
every_family = pytest.mark.parametrize('family', FAMILIES)


def timm_vit(name: str = 'augreg', **changes) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer(**dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5,
                                    dynamic_img_size=True) | TIMM[name][0] | changes)


def hf_vit(name: str, **changes) -> nn.Module:
    import transformers
    kind, options = HF[name]
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32,
                                       patch_size=8) | options | changes))


def build(family: str) -> nn.Module:
    """A tiny ViT with weights that make every part of it visible in its outputs."""
    if family in TIMM:
        model = timm_vit(family)
    elif family in EVA:
        from timm.models.eva import Eva
        model = Eva(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5,
                    dynamic_img_size=True, **EVA[family])
    elif family in HF:
        model = hf_vit(family)
    elif family == 'adala':
        model = MODELS.build(tiny_vit(depth=3, num_registers=2))
    else:
        from mmpretrain.models.backbones import VisionTransformer
        model = VisionTransformer(arch=dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64),
                                  img_size=32, patch_size=8, out_type='raw', layer_scale_init_value=1e-5,
                                  with_cls_token=family == 'mmpretrain')
    return awaken(model)


def awaken(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float('norm' in name and 'weight' in name or '.ln' in name), std=0.3)
    model.eval()  # not in a chain: mmpretrain's returns None
    return model


def run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """All that the model says of its patches."""
    name = type(model).__name__
    if name in ('CLIPVisionModel', 'SiglipVisionModel', 'ViTModel', 'DeiTModel'):
        return model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
    if name.endswith('Backbone'):
        return torch.cat([maps.flatten(2) for maps in model(images).feature_maps], dim=-1)
    if name in ('Dinov2Model', 'Dinov2WithRegistersModel', 'DINOv3ViTModel', 'DPTModel'):
        return model(images).last_hidden_state
    return model.forward_features(images) if hasattr(model, 'blocks') else model(images)[-1]


def attentions(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def own_vit(name: str, attention: dict = LINEAR) -> nn.Module:
    return MODELS.build(tiny_vit(depth=3, attention=attention) | TIMM[name][1]).eval()


def headless(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.startswith(('head', 'attn_pool'))}


class MeanAttention(Attention):
    def mix(self, q, k, v, hw, num_prefix):
        return v.mean(dim=2, keepdim=True).expand_as(v)


def batches(count: int = 2, size=(2, 3, 32, 32)) -> list[torch.Tensor]:
    return [torch.randn(size, generator=torch.Generator().manual_seed(i)) for i in range(count)]


SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
