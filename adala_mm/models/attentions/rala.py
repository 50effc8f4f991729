from __future__ import annotations

import torch
from torch import Tensor

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.parts import DepthwiseConv, IdentityGate, grid_angles, rotate
from adala_mm.ops import Rotation, elu1, in_float32
from adala_mm.registry import ATTENTIONS


@ATTENTIONS.register_module()
class RALAAttention(Attention):
    """Rank-augmented linear attention (Fan et al. 2025, arXiv 2411.07635).

    With ``phi = elu + 1``, the global query ``g = mean_n phi(q_n)`` weighs the keys:
    ``alpha = N softmax_n(g·phi(k_n) / sqrt D)``, ``k' = alpha phi(k)``. Then

    ``o_i = rot(phi(q_i)) [mean_j rot(k'_j)^T v_j] / (phi(q_i) · mean_j k'_j + eps)``,
    ``out = proj((o + dwconv5x5(v)) * gate(x))``,

    rot being a rotation by place: row times ``10000^-linspace(0, 1, D / 4)`` on the first half of a head's channels,
    column times the same on the second. The denominator is not rotated, so weights may be negative. Any grid; class
    and register tokens, absent from the paper, turn by zero and see no convolution. The gate is linear and starts
    as 1, the convolution as 0. In float32 throughout.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        eps: added to the denominator.
        rotary: whether there is the rotation; without, weights are positive and sum to 1.

    Raises:
        ValueError: if 4 does not divide D and there is a rotation.
    """

    formula = '((rot φ(q)·Σ rot(αφ(k))ᵀv / φ(q)·Σαφ(k)) + dwconv v) ⊙ gate(x), φ = elu+1, α = softmax of mean φ(q)·φ(k)'
    cost = '2ND²'
    positional = True
    reference = 'Fan et al., CVPR 2025'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, eps: float = 1e-6,
                 rotary: bool = True) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        head_dim = dim // num_heads
        if rotary and head_dim % 4:
            raise ValueError(f'{head_dim} channels in a head: the rotation by row and column needs a multiple of 4')
        self.eps = eps
        self.rotary = rotary
        self.lepe = DepthwiseConv(dim, 5)
        self.gate = IdentityGate(dim)

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        dim = q.shape[-1]
        local = self.lepe(v, hw, num_prefix)
        q, k = elu1(q), elu1(k)
        k = k * (dim ** -0.5 * k @ q.mean(dim=2).unsqueeze(-1)).softmax(dim=2)  # alpha / N: the sums become means
        weight = q @ k.sum(dim=2).unsqueeze(-1)
        if self.rotary:
            frequencies = 10000 ** -torch.linspace(0, 1, dim // 4, device=q.device, dtype=q.dtype)
            angles = grid_angles(hw, num_prefix, frequencies)
            q, k = rotate(q, angles), rotate(k, angles)
        return q @ (k.transpose(-2, -1) @ v) / (weight + self.eps) + local

    def attend(self, x: Tensor, hw: tuple[int, int], num_prefix: int, rotation: Rotation | None = None) -> Tensor:
        return super().attend(x, hw, num_prefix, rotation) * self.gate(x)
