"""Attention matrices of layers that have them, looked at a few queries at a time."""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adala_mm.models.algorithms.attention_alignment import softmax_weights
from adala_mm.models.attentions import Attention
from adala_mm.models.attentions.heads import centred
from adala_mm.models.attentions.linear import LinearAttention
from adala_mm.ops import FEATURE_MAPS

QUERIES = 256  # whose weights on all keys are in memory at a time


@torch.no_grad()
def attention_entropy(attn: Attention, h: Tensor, *layout: Any) -> Tensor | None:
    """Mean entropy of the rows of an attention matrix, as a share of the largest possible one.

    ``-sum_j A_ij log A_ij / log N``, the mean over images and queries: 1 if every query looks at all tokens alike, 0
    if at one alone. A is softmax(q k^T / sqrt(D)), for linear attention what it implies,
    ``phi(q_i)·phi(k_j) / sum_j phi(q_i)·phi(k_j)``, and ``weights(q, k)`` for layers with that method (Hedgehog). The
    cost is quadratic in tokens, the memory is not.

    Args:
        h: what the layer reads, (B, N, C).
        layout: what it is told beside that, as of `AdaLAViT.layout`.

    Returns:
        (H,), one per head, or None for a layer whose weights are not known or may be negative.
    """
    q, k, _ = (x.float() for x in attn.turned(h, *layout))
    if attn.is_softmax:
        def weights(q: Tensor) -> Tensor:
            return softmax_weights(q, k)
    elif isinstance(attn, LinearAttention) and attn.feature_map != 'identity':
        q, k = FEATURE_MAPS[attn.feature_map](q, centred(k) if attn.center_keys else k)

        def weights(q: Tensor) -> Tensor:
            scores = q @ k.transpose(-2, -1)
            return scores / (scores.sum(-1, keepdim=True) + attn.eps)
    elif hasattr(attn, 'weights'):
        def weights(q: Tensor) -> Tensor:
            return attn.weights(q, k)
    else:
        return None
    total = sum(torch.special.entr(weights(part)).sum(-1).sum(dim=(0, 2)) for part in q.split(QUERIES, dim=2))
    return total / (q.shape[0] * q.shape[2]) / math.log(k.shape[2])
