from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.heads import merge_heads, split_heads
from adala_mm.models.attentions.parts import DepthwiseConv, GridTable, require_grid
from adala_mm.ops import in_float32, weighted_sums
from adala_mm.registry import ATTENTIONS


@ATTENTIONS.register_module()
class FocusedAttention(Attention):
    """Focused linear attention, FLatten (Han et al. 2023, arXiv 2308.00442).

    ``f(x) = |t| t^p / |t^p|`` with ``t = (relu(x) + 1e-6) / softplus(scale)`` sharpens features and keeps their
    length. With q' = f(q), k' = f(k + position):

    ``out_i = q'_i [mean_j k'_j^T v_j] / (q'_i · mean_j k'_j + eps) + dwconv5x5(v)_i``

    Lengths are taken over all C channels, before heads are split, as the published code does. The convolution's
    kernels are shared by the heads. Class and register tokens, absent from the paper, have no position and see no
    convolution. Positions are resampled to other grids. In float32 throughout: the cube of 1e-6 is 0 in float16.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        focus: p.
        kernel_size: of the convolution.
        eps: added to the denominator.
        grid: patch grid (h, w) of the positions; a ViT gives its own.

    Raises:
        ValueError: without a ``grid``, and for an even ``kernel_size``.
    """

    needs = ('grid',)
    formula = 'f(q)·Σf(k)ᵀv / f(q)·Σf(k) + dwconv v, f(x) = |t| tᵖ/|tᵖ|, t = relu(x)/s'
    cost = '2ND²'
    positional = True
    reference = 'Han et al., ICCV 2023'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, focus: float = 3.0, kernel_size: int = 5,
                 eps: float = 1e-6, grid: tuple[int, int] | None = None) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        self.focus = focus
        self.eps = eps
        self.position = GridTable(dim, require_grid('FocusedAttention', grid))
        self.sharpen = nn.ParameterDict({'scale': torch.zeros(dim)})
        self.dwc = DepthwiseConv(dim // num_heads, kernel_size)

    def features(self, x: Tensor) -> Tensor:
        """f of (B, H, N, D), with lengths over the channels of all heads."""
        t = (F.relu(merge_heads(x)) + 1e-6) / F.softplus(self.sharpen['scale'])  # (B, N, C)
        power = (t / t.detach().amax(dim=-1, keepdim=True)) ** self.focus  # its size cancels, and cannot underflow
        return split_heads(power * (t.norm(dim=-1, keepdim=True) / power.norm(dim=-1, keepdim=True)), self.num_heads)

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        position = F.pad(self.position(hw).flatten(1).T, (0, 0, num_prefix, 0))  # (N, C)
        k = k + split_heads(position[None], self.num_heads)
        total, weight = weighted_sums(self.features(q), self.features(k) / k.shape[2], v)
        return total / (weight + self.eps) + self.dwc(v, hw, num_prefix)
