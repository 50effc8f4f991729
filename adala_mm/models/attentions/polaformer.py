from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.heads import split_heads
from adala_mm.models.attentions.parts import DepthwiseConv, GridTable, IdentityGate, require_grid
from adala_mm.ops import Rotation, in_float32, weighted_sums
from adala_mm.registry import ATTENTIONS


@ATTENTIONS.register_module()
class PolaFormerAttention(Attention):
    """Polarity-aware linear attention (Meng et al. 2025, arXiv 2501.15061).

    q and k (plus position), divided by ``softplus(scale)``, are split into parts by sign, ``x+- = relu(+-x)^p`` with
    ``p = 1 + alpha sigmoid(w)`` per channel. The first half of v's channels is weighed by products of equal signs,
    ``[q+, q-]·[k+, k-]``, the second by those of opposite signs, ``[q-, q+]·[k+, k-]``, each divided by its own
    ``mean_j + eps``. Then ``out = proj((o + dwconv5x5(v)) * gate(x))``.

    The convolution's kernels are shared by the heads and start at 0, the gate is linear and starts as 1. Class and
    register tokens, absent from the paper, have no position and see no convolution. Positions are resampled to other
    grids. In float32 throughout.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        alpha: p lies between 1 and 1 + alpha.
        kernel_size: of the convolution.
        eps: added to the denominators.
        grid: patch grid (h, w) of the positions; a ViT gives its own.

    Raises:
        ValueError: without a ``grid``, for an even ``kernel_size``, or if the channels of a head cannot be halved.
    """

    needs = ('grid',)
    formula = '([q±]·Σ[k±]ᵀv / [q±]·Σ[k±] for equal, opposite signs + dwconv v) ⊙ gate(x), x± = relu(±x)ᵖ, p learnt'
    cost = '4ND²'
    positional = True
    reference = 'Meng et al., ICLR 2025'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, alpha: float = 4.0, kernel_size: int = 5,
                 eps: float = 1e-6, grid: tuple[int, int] | None = None) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        head_dim = dim // num_heads
        if head_dim % 2:
            raise ValueError(f'{head_dim} channels in a head cannot be halved between equal and opposite signs')
        self.alpha = alpha
        self.eps = eps
        self.position = GridTable(dim, require_grid('PolaFormerAttention', grid))
        self.polarity = nn.ParameterDict({'scale': torch.zeros(dim), 'power': torch.zeros(num_heads, 1, head_dim)})
        self.dwc = DepthwiseConv(head_dim, kernel_size)
        self.gate = IdentityGate(dim)

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        position = F.pad(self.position(hw).flatten(1).T, (0, 0, num_prefix, 0))  # (N, C)
        scale = F.softplus(self.polarity['scale']).view(self.num_heads, 1, -1)
        q, k = q / scale, (k + split_heads(position[None], self.num_heads)) / scale
        power = 1 + self.alpha * self.polarity['power'].sigmoid()
        q_pos, q_neg, k_pos, k_neg = (F.relu(x) ** power for x in (q, -q, k, -k))
        keys = torch.cat([k_pos, k_neg], dim=-1) / k.shape[2]
        out = []
        for signs, values in zip(((q_pos, q_neg), (q_neg, q_pos)), v.chunk(2, dim=-1), strict=True):
            total, weight = weighted_sums(torch.cat(signs, dim=-1), keys, values)
            out.append(total / (weight + self.eps))
        return torch.cat(out, dim=-1) + self.dwc(v, hw, num_prefix)

    def attend(self, x: Tensor, hw: tuple[int, int], num_prefix: int, rotation: Rotation | None = None) -> Tensor:
        return super().attend(x, hw, num_prefix, rotation) * self.gate(x)
