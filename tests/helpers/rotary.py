"""Narrow ViTs with rotary positions: timm's and ours."""
from __future__ import annotations

import torch
from timm.models.eva import Eva
from torch import nn

from adala_mm.registry import MODELS
from helpers import tiny_vit

# A narrow one of timm's, and ours.
NARROW = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0, dynamic_img_size=True,
              use_rot_pos_emb=True, rope_type='dinov3', rope_temperature=100, rope_rotate_half=True,
              use_abs_pos_emb=False, num_reg_tokens=4, init_values=1e-5, qkv_bias=False, use_fc_norm=False)


def awake(model: nn.Module) -> nn.Module:
    """Every part off its neutral start: LayerScale of 1e-5 would hide the blocks."""
    for name, parameter in model.named_parameters():
        fan = parameter.shape[1] if parameter.ndim == 2 else 16
        nn.init.normal_(parameter, mean=float('norm' in name and 'weight' in name or 'gamma' in name),
                        std=fan ** -0.5 / 2)
    return model.eval()


def narrow(**changes) -> Eva:
    return awake(Eva(**NARROW | changes))


def own(**changes) -> nn.Module:
    return MODELS.build(tiny_vit(num_registers=4, layer_scale=1.0, qkv_bias=False, rotary=dict()) | changes)


def loaded(theirs: Eva, path, **options) -> nn.Module:
    """Our ViT with timm's weights, by way of a file."""
    torch.save(theirs.state_dict(), path)
    model = own(init_cfg=dict(type='Pretrained', checkpoint=str(path)), **options)
    model.init_weights()
    return model.eval()


def softmax_file(path, **options) -> tuple[dict, nn.Module]:
    """A file of a softmax ViT with rotary positions, as ``init_cfg``, and the ViT."""
    model = awake(own(**options))
    torch.save(model.state_dict(), path)
    return dict(type='Pretrained', checkpoint=str(path)), model
