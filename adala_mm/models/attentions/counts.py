from __future__ import annotations

from collections import Counter

from torch import nn

from adala_mm.models.attentions.base import Attention


def blocks_by_attention(model: nn.Module) -> dict[str, str]:
    """``12 of 24 blocks LinearAttention, 12 SoftmaxAttention`` for each part of a model, a frozen teacher included."""
    told, frozen = {}, {f'frozen {name}': part for name, part in getattr(model, 'frozen', {}).items()}
    for name, part in [*model.named_children(), *frozen.items()]:
        layers = sorted((m for m in part.modules() if isinstance(m, Attention)), key=lambda layer: layer.is_softmax)
        if layers:
            (kind, count), *others = Counter(type(layer).__name__ for layer in layers).items()
            told[name] = ', '.join([f'{count} of {len(layers)} blocks {kind}', *(f'{n} {k}' for k, n in others)])
    return told
