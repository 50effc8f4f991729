"""Linear attention as its formula says, in PyTorch's own operators, and its feature maps (ViT-AdaLA A.3)."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.ops.exporting import exporting
from adala_mm.ops.precision import in_float32

Features = tuple[Tensor, Tensor]


def elu1(x: Tensor) -> Tensor:
    """``elu(x) + 1``: x + 1 where x is positive, exp(x) elsewhere."""
    # The branch not taken is kept finite: exp of a large x would turn its zero gradient into 0 * inf = NaN.
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def shifted_exp(q: Tensor, k: Tensor) -> Features:
    """exp(q), exp(k) up to factors that cancel between numerator and denominator.

    A factor exp(-c_d) on feature d of all keys is undone by exp(c_d) on that feature of the queries, and a common
    factor of one query cancels by itself. With c_d the largest key the denominator is at least 1: nothing can
    overflow or underflow, whatever the size of q and k.
    """
    peak = k.detach().amax(dim=-2, keepdim=True)
    q = q + peak
    return torch.exp(q - q.detach().amax(dim=-1, keepdim=True)), torch.exp(k - peak)


FEATURE_MAPS: dict[str, Callable[[Tensor, Tensor], Features]] = {
    'elu1': lambda q, k: (elu1(q), elu1(k)),
    'relu': lambda q, k: (F.relu(q), F.relu(k)),
    'softplus': lambda q, k: (F.softplus(q), F.softplus(k)),
    'softmax': lambda q, k: (q.softmax(dim=-1), k.softmax(dim=-1)),
    'exp': shifted_exp,
    'efficient': lambda q, k: (q.softmax(dim=-1), k.softmax(dim=-2)),  # Shen et al. 2021: of keys, over the tokens
    'identity': lambda q, k: (q, k),  # of features that are there already, whose products must not be negative
}


def weighted_sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_j (q_i·k_j) v_j`` and ``sum_j q_i·k_j`` for features q and k, in the cheaper of two orders.

    What kernel attentions have in common; how they divide the one by the other is what they differ in. ``q (k^T v)``
    takes (Nq + Nk) F D multiply-adds, ``(q k^T) v`` takes Nq Nk (F + D): less if there are fewer tokens than channels
    (N < D if F = D), as in a window. In an exported graph, whose N is open, it is always the former.

    Args:
        q, k: features (B, H, N, F).
        v: (B, H, N, D), as many as k.

    Returns:
        (B, H, N, D) and (B, H, N, 1), as many as q.
    """
    (nq, f), (nk, d) = q.shape[-2:], v.shape[-2:]
    if not exporting() and nq * nk * (f + d) < (nq + nk) * f * d:
        scores = q @ k.transpose(-2, -1)  # (B, H, Nq, Nk)
        return scores @ v, scores.sum(dim=-1, keepdim=True)
    return q @ (k.transpose(-2, -1) @ v), q @ k.sum(dim=-2).unsqueeze(-1)


@in_float32
def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, feature_map: str = 'elu1',
                               eps: float = 1e-6) -> Tensor:
    """`linear_attention` in plain PyTorch, for any device, dtype and feature map, differentiable by autograd."""
    total, weight = weighted_sums(*FEATURE_MAPS[feature_map](q, k), v)
    return total / (weight + eps)


def check_feature_map(feature_map: str) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f'unknown feature_map {feature_map!r}; choose one of {", ".join(FEATURE_MAPS)}')
