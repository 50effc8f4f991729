from __future__ import annotations

import torch
from torch import Tensor

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.heads import merge_heads, split_heads
from adala_mm.models.attentions.parts import DepthwiseConv, grid_angles, rotate
from adala_mm.ops import elu1, in_float32
from adala_mm.registry import ATTENTIONS


@ATTENTIONS.register_module()
class MLLAAttention(Attention):
    """Rotary linear attention of MLLA (Han et al. 2024, arXiv 2405.16605).

    ``o_i = rope(phi(q_i)) [mean_j rope(phi(k_j))^T v_j] / (phi(q_i) · mean_j phi(k_j) + eps) + dwconv3x3(v)_i``,
    ``phi = elu + 1``. The rotation runs over all C channels, C / 4 frequencies ``10000^(-4 i / C)`` by row, then as
    many by column: so the first half of the heads knows rows only, the second columns only. The denominator is not
    rotated, so weights may be negative. Any grid; class and register tokens, absent from the paper, turn by zero
    and see no convolution (which starts at 0). In float32 throughout.

    MLLA's block has neither a value nor an output projection, but convolutions and a gate around; a pretrained ViT has
    the former and keeps them, and only the attention is MLLA's.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        eps: added to the denominator.

    Raises:
        ValueError: if 4 does not divide C.
    """

    formula = 'rope φ(q)·Σ rope φ(k)ᵀv / φ(q)·Σφ(k) + dwconv v, φ = elu+1'
    cost = '2ND²'
    positional = True
    reference = 'Han et al., NeurIPS 2024'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, eps: float = 1e-6) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if dim % 4:
            raise ValueError(f'width {dim}: the rotation by row and column needs a multiple of 4')
        self.eps = eps
        self.lepe = DepthwiseConv(dim, 3)

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        n, dim = q.shape[2], self.proj.in_features
        exponents = torch.arange(dim // 4, device=q.device, dtype=q.dtype) / (dim // 4)
        angles = grid_angles(hw, num_prefix, 10000 ** -exponents)
        q, k = elu1(q), elu1(k) / n
        turned_q, turned_k = (split_heads(rotate(merge_heads(x), angles), self.num_heads) for x in (q, k))
        total = turned_q @ (turned_k.transpose(-2, -1) @ v)
        return total / (q @ k.sum(dim=2).unsqueeze(-1) + self.eps) + self.lepe(v, hw, num_prefix)
