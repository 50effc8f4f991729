from __future__ import annotations

import torch
from torch import Tensor, nn

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.heads import centred
from adala_mm.models.attentions.parts import DepthwiseConv
from adala_mm.ops import in_float32, shifted_exp, weighted_sums
from adala_mm.registry import ATTENTIONS

VARIANTS = ('softmax', 'half', 'joint', 'exp')


class HedgehogMap(nn.Module):
    """The trainable part of the feature maps: ``y = W_h x`` with a matrix per head, D to F, for keys another or not."""

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int, shared: bool = False) -> None:
        super().__init__()
        eye = torch.eye(head_dim, feature_dim).repeat(num_heads, 1, 1)
        self.q = nn.Parameter(eye.clone())  # (H, D, F)
        self.k = None if shared else nn.Parameter(eye.clone())

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q @ self.q.to(q.dtype), k @ (self.q if self.k is None else self.k).to(k.dtype)


@ATTENTIONS.register_module()
class HedgehogAttention(Attention):
    """Linear attention with learnt feature maps that mimic softmax (Zhang et al. 2024, arXiv 2402.04347).

    ``out_i = phi_q(q_i) [sum_j phi_k(k_j)^T v_j] / (phi_q(q_i) · sum_j phi_k(k_j) + eps)``, ``y = W_h x``, and phi is

    - ``softmax``: ``[softmax(y), softmax(-y)]``, at least eps, two softmaxes over F features each (as in LoLCATS);
    - ``half``: the first of the two, at a third less cost (LoLCATS' half space);
    - ``joint``: one softmax over all 2 F entries of ``[2 y, -2 y]``;
    - ``exp``: ``[exp(y), exp(-y)]``, the paper's main text; shifted so that nothing overflows, which cancels.

    These are different attentions: a factor of one query cancels in the ratio, one of a single key does not. W starts
    as the identity. Published maps may have a bias, and one W for all heads (flash-linear-attention's), or add x to
    ``W x``: ours do not. Position-free, any number of tokens; class and register tokens are tokens like others. In
    float32 throughout: eps is 0 in float16.

    With ``dwconv``, beyond the paper: plus a depth-wise convolution of the values, as `LinearAttention` has it.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        feature_dim: F, D if None; there are 2 F features, of ``half`` F.
        variant: ``softmax``, ``half``, ``joint`` or ``exp``.
        eps: added to the denominator.
        dwconv: side of the kernel, odd; None for no convolution.
        center_keys: whether W sees the keys less their mean over the image (`centred`).
        shared_map: whether queries and keys have one W. With ``half`` that is what ViT-AdaLA's Table 10 counts.

    Raises:
        ValueError: for an unknown ``variant``, a ``feature_dim`` below 1, or a ``dwconv`` that is even or not positive.
    """

    formula = 'φ(q)·Σφ(k)ᵀv / φ(q)·Σφ(k), φ(x) = [softmax(Wx), softmax(−Wx)], W learnt'
    cost = '6NDF'
    reference = 'Zhang et al., ICLR 2024'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, feature_dim: int | None = None,
                 variant: str = 'softmax', eps: float = 1e-12, dwconv: int | None = None,
                 center_keys: bool = False, shared_map: bool = False) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if variant not in VARIANTS:
            raise ValueError(f'unknown variant {variant!r}; choose one of {", ".join(VARIANTS)}')
        self.variant = variant
        self.eps = eps
        self.center_keys = center_keys
        feature_dim = dim // num_heads if feature_dim is None else feature_dim
        if feature_dim < 1:
            raise ValueError(f'feature_dim={feature_dim}: at least one feature is needed')
        self.feature_map = HedgehogMap(num_heads, dim // num_heads, feature_dim, shared_map)
        self.dwconv = None if dwconv is None else DepthwiseConv(dim, dwconv)
        self.positional = self.dwconv is not None

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """phi_q(q) and phi_k(k), each (B, H, N, 2 F), of some queries and all keys."""
        maps = self.feature_map(q, centred(k) if self.center_keys else k)
        if self.variant == 'softmax':
            return tuple(torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1).clamp_min(self.eps) for y in maps)
        if self.variant == 'half':
            return tuple(y.softmax(-1).clamp_min(self.eps) for y in maps)
        if self.variant == 'joint':
            return tuple(torch.cat([2 * y, -2 * y], dim=-1).softmax(-1) for y in maps)
        return shifted_exp(*(torch.cat([y, -y], dim=-1) for y in maps))

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        total, weight = weighted_sums(*self.features(q, k), v)
        out = total / (weight + self.eps)
        return out if self.dwconv is None else out + self.dwconv(v, hw, num_prefix)

    @in_float32
    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention weights (B, H, Nq, N) of some queries; rows sum to 1. What Hedgehog's own distillation compares."""
        q, k = self.features(q, k)
        scores = q @ k.transpose(-2, -1)
        return scores / (scores.sum(-1, keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        return f'variant={self.variant}'
