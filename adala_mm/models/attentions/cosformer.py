from __future__ import annotations

from math import pi

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.ops import in_float32, weighted_sums
from adala_mm.registry import ATTENTIONS

CLS_POLICIES = ('index', 'neutral')


def cosine_weighted_sums(q: Tensor, k: Tensor, v: Tensor, angles: list[Tensor],
                         num_prefix: int) -> tuple[Tensor, Tensor]:
    """Sums with weight ``relu(q_i)·relu(k_j) sum_a cos(t_ai - t_aj)``, O(N D^2) by cosine's addition theorem.

    Args:
        q, k, v: (B, H, N, D).
        angles: one (N - num_prefix,) per a.
        num_prefix: leading tokens without a place: their cosines are all 1.

    Returns:
        weighted values (B, H, N, D) and the sum of weights (B, H, N, 1).
    """
    q, k = F.relu(q), F.relu(k)
    waves = torch.cat([f(t)[:, None] for t in angles for f in (torch.cos, torch.sin)], dim=1).to(q.dtype)  # (n, 2 A)

    def features(x: Tensor) -> Tensor:
        return (x[:, :, num_prefix:, None, :] * waves[:, :, None]).flatten(-2)  # (B, H, n, 2 A D)

    sums = weighted_sums(features(q), features(k), v[:, :, num_prefix:])
    if not num_prefix:
        return sums
    near = weighted_sums(q[:, :, num_prefix:], k[:, :, :num_prefix], v[:, :, :num_prefix])
    prefix = weighted_sums(q[:, :, :num_prefix], k, v)
    return tuple(torch.cat([len(angles) * p, patches + len(angles) * n], dim=2)
                 for p, patches, n in zip(prefix, sums, near, strict=True))


@ATTENTIONS.register_module()
class CosformerAttention(Attention):
    """Linear attention that fades with distance in the sequence (Qin et al. 2022, arXiv 2202.08791).

    ``out_i = sum_j w_ij v_j / max(sum_j w_ij, eps)``, ``w_ij = relu(q_i)·relu(k_j) cos(pi / 2 (i - j) / N)``. Tokens
    are counted row by row, so distances within a row change with the grid's width; any number of tokens. For distance
    on the grid see `VicinityAttention`. In float32 throughout. Where keys come from another sequence than queries,
    which they never do here, published code takes the longer one's length for N.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        cls_policy: class and register tokens are the first of the sequence (``index``, as published), next to the
            first row and all but blind to the last; or have no place and see all with cosine 1 (``neutral``).
        eps: floor of the denominator: a query without a positive channel gives 0.

    Raises:
        ValueError: for an unknown ``cls_policy``.
    """

    formula = 'Σw v / Σw, w = relu(q)·relu(k) cos(π(i−j)/2N)'
    cost = '4ND²'
    positional = True
    reference = 'Qin et al., ICLR 2022'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, cls_policy: str = 'index',
                 eps: float = 1e-6) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if cls_policy not in CLS_POLICIES:
            raise ValueError(f'unknown cls_policy {cls_policy!r}; choose one of {", ".join(CLS_POLICIES)}')
        self.cls_policy = cls_policy
        self.eps = eps

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        outside = num_prefix if self.cls_policy == 'neutral' else 0
        tokens = q.shape[2] - outside
        index = torch.arange(1, tokens + 1, device=q.device, dtype=torch.float64)
        total, weight = cosine_weighted_sums(q, k, v, [pi / 2 * index / tokens], outside)
        return total / weight.clamp_min(self.eps)
