from __future__ import annotations

from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.parts import require_odd
from adala_mm.ops import in_float32
from adala_mm.registry import ATTENTIONS


class TokenConv(nn.Module):
    """Convolution over the sequence of tokens, one kernel per head, without bias; starts at 0."""

    def __init__(self, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        require_odd(kernel_size)
        self.weight = nn.Parameter(torch.zeros(num_heads, 1, kernel_size, 1))

    def forward(self, v: Tensor) -> Tensor:
        """(B, H, N, D) to (B, H, N, D)."""
        size = self.weight.shape[2]
        return F.conv2d(v, self.weight.to(v.dtype), padding=(size // 2, 0), groups=v.shape[1])


@ATTENTIONS.register_module()
class CastlingAttention(Attention):
    """Linear-angular attention of Castling-ViT (You et al. 2023, arXiv 2211.10526).

    The angular kernel ``1 - angle / pi`` to first order, for q and k of length 1:
    ``o_i = v_i / 2 + q_i [sum_j k_j^T v_j] / pi``, ``out = o / |o| + conv(v)``, lengths per token and head. As in the
    published code, the constant 1/2 stands with the token's own value. conv runs over the sequence, 9 taps for each
    head, class and register tokens included. Any number of tokens. The sparse softmax branch, which training anneals
    away, is left out. Lengths are at least eps: a zero token gives 0, not NaN. In float32 throughout.

    Every head leaves with length 1, whatever the values' size: the output projection has to learn the scale.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        kernel_size: taps of the convolution, odd.
        eps: least length to divide by.

    Raises:
        ValueError: for an even ``kernel_size``.
    """

    formula = 'o/|o| + conv v, o = v/2 + q·Σkᵀv/π, q and k of length 1'
    cost = '2ND²'
    positional = True
    reference = 'You et al., CVPR 2023'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, kernel_size: int = 9,
                 eps: float = 1e-12) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        self.eps = eps
        self.dconv = TokenConv(num_heads, kernel_size)

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        q, k = F.normalize(q, dim=-1, eps=self.eps), F.normalize(k, dim=-1, eps=self.eps)
        out = v / 2 + q @ (k.transpose(-2, -1) @ v) / pi
        return F.normalize(out, dim=-1, eps=self.eps) + self.dconv(v)
