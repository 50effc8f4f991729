from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.parts import GridTable, require_grid
from adala_mm.registry import ATTENTIONS


class TokenProjection(nn.Module):
    """Sums N tokens to R: ``out_r = sum_n E_nr x_n``, E for all heads, drawn from U(-1 / sqrt R, 1 / sqrt R).

    On another grid, E is resampled over the patches and scaled by N0 / N, which keeps the weight of a region.
    """

    def __init__(self, rank: int, grid: tuple[int, int], num_prefix: int) -> None:
        super().__init__()
        self.patches = GridTable(rank, grid, keep_sum=True)
        self.prefix = nn.Parameter(torch.zeros(rank, num_prefix))
        for table in (self.patches.weight, self.prefix):
            nn.init.uniform_(table, -rank ** -0.5, rank ** -0.5)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, H, N, D) to (B, H, R, D)."""
        return torch.cat([self.prefix, self.patches(hw).flatten(1)], dim=1).to(x.dtype) @ x


@ATTENTIONS.register_module()
class LinformerAttention(Attention):
    """Softmax attention on keys and values that are summed to R rows (Wang et al. 2020, arXiv 2006.04768).

    ``out = softmax(q (E^T k)^T / sqrt(D)) (F^T v)`` with learnt E, F (N, R), shared by the heads of a layer. Class and
    register tokens have rows of their own. On a grid other than the one built for, E and F are resampled bicubically
    over the patches; published code takes the first N rows, which mixes up places when the width changes.

    E and F start at random: without training nothing of the pretrained attention is left.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        rank: R (the paper's 256; ViT-AdaLA's columns of parameters and FLOPs imply 32).
        share_kv: one matrix for keys and values.
        grid, num_prefix: patch grid (h, w) and class and register tokens; a ViT gives its own.

    Raises:
        ValueError: without a ``grid``, for a rank below 1, or for inputs with another number of prefix tokens.
    """

    needs = ('grid', 'num_prefix')
    formula = 'softmax(q(Eᵀk)ᵀ/√D)Fᵀv, E and F (N, R) learnt'
    cost = '4NRD'
    positional = True
    reference = 'Wang et al. 2020'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, rank: int = 256, share_kv: bool = False,
                 grid: tuple[int, int] | None = None, num_prefix: int = 0) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if rank < 1:
            raise ValueError(f'rank={rank}: keys and values need at least one row')
        grid = require_grid('LinformerAttention', grid)
        self.token_proj = nn.ModuleDict({name: TokenProjection(rank, grid, num_prefix)
                                         for name in (('kv',) if share_kv else ('k', 'v'))})

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        e, f = (self.token_proj[name if name in self.token_proj else 'kv'] for name in 'kv')
        if e.prefix.shape[1] != num_prefix:
            raise ValueError(f'LinformerAttention was built for {e.prefix.shape[1]} class and register tokens and got '
                             f'{num_prefix}: its projection has a row for each')
        return F.scaled_dot_product_attention(q, e(k, hw), f(v, hw))
