"""What timm says of its models by name alone, without weights."""
from __future__ import annotations

import timm
import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import nn

# Of timm's models only PE core, which has rotary positions that no weight shows, has all of these.
PE_CORE = {'cls_token', 'norm_pre.weight', 'attn_pool.latent'}


def on_meta(name: str) -> nn.Module | None:
    """timm's model ``name``, whose parameters take no memory; None if timm knows none."""
    try:
        with torch.device('meta'):
            return timm.create_model(name)
    except (RuntimeError, ValueError):
        return None


def refuse_other_rotary(name: str) -> None:
    """Raises ValueError if timm's model ``name`` has rotary positions of another kind than DINOv3's.

    They are computed, so that neither keys nor shapes of its weights need show them.
    """
    rope = getattr(on_meta(name), 'rope', None)
    if rope is not None and not isinstance(rope, RotaryEmbeddingDinoV3):
        raise ValueError(f"{name} has rotary positions of another kind than DINOv3's (timm's {type(rope).__name__}), "
                         "which AdaLAViT lacks; adala_mm.linearize takes timm's model as it is")
