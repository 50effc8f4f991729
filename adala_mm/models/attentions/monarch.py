from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.parts import DepthwiseConv
from adala_mm.models.attentions.tiles import check_tile, fit_tile, from_tiles, padded, real_patches, to_tiles
from adala_mm.ops import in_float32
from adala_mm.registry import ATTENTIONS


def monarch_attention(q: Tensor, k: Tensor, v: Tensor, num_steps: int = 1, real: Tensor | None = None,
                      single: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Attention by the Monarch matrix that is closest to softmax's in the variational sense (Yaras et al. 2025).

    Softmax attention is the row-stochastic M that maximises ``<M, q k^T> + entropy(M)``. Here M is bound to
    ``M[(l,j),(k,i)] = L[j,k,l] R[k,j,i]``, the tokens being m blocks of b: query j of block l, key i of block k.
    From ``L = [k = l]``, each step maximises exactly over R, then over L:

    ``a = sum_l L q / sum_l L``, ``R = softmax_i(a·k)``, then ``L = softmax_k(q·kbar - s)`` with ``kbar = sum_i R k``
    and ``s = sum_i R log R``. The result is ``sum_k L sum_i R v``; its weights sum to 1. One block, or blocks of one
    token, give softmax attention.

    Args:
        q, k, v: (B, H, m, b, D), q times D^-1/2.
        num_steps: at least 1.
        real: (m, b), False where a place is padded: a key that nobody sees, a zero query without weight in a.
        single: keys and values (B, H, P, D) that are a block of their own each: a score q·k, without entropy.

    Returns:
        (B, H, m, b, D).
    """
    p = 0 if single is None else single[0].shape[2]

    def with_single(blocks: Tensor, which: int) -> Tensor:  # (B, H, j, k, D) to (B, H, j, P + k, D)
        if single is None:
            return blocks
        return torch.cat([single[which].unsqueeze(2).expand(-1, -1, blocks.shape[2], -1, -1), blocks], dim=3)

    columns = q.transpose(2, 3)  # (B, H, j, l, D)
    a, left = q, None  # a (B, H, k, j, D); where L = [k = l], and the query of a padded place is zero
    for _ in range(num_steps):
        if left is not None:
            share = left[..., p:] if real is None else left[..., p:] * real.T[..., None]  # (B, H, j, l, k)
            total = share.sum(-2).unsqueeze(-1).clamp_min(torch.finfo(q.dtype).tiny)
            a = (share.mT @ columns / total).transpose(2, 3)
        logits = a @ k.mT  # (B, H, k, j, i)
        if real is not None:
            logits = logits.masked_fill(~real[:, None], torch.finfo(q.dtype).min)
        right = logits.softmax(-1)
        mean_key = right @ k  # (B, H, k, j, D)
        # s = sum_i R log R = a·kbar - logsumexp, without a logarithm of zero
        s = (a * mean_key).sum(-1) - logits.logsumexp(-1)  # (B, H, k, j)
        scores = columns @ with_single(mean_key.transpose(2, 3), 0).mT  # (B, H, j, l, P + k)
        left = (scores - F.pad(s.mT, (p, 0)).unsqueeze(-2)).softmax(-1)
    return (left @ with_single((right @ v).transpose(2, 3), 1)).transpose(2, 3)


@ATTENTIONS.register_module()
class MonarchAttention(Attention):
    """`monarch_attention` with rows or tiles of the patch grid as blocks, made to replace softmax without training.

    Queries of class and register tokens take the softmax over all keys, and as keys they are blocks of their own, of
    one token each. That costs O(N) and is ours: with ``exact_prefix=False`` they share a block in front of the first,
    filled up with padding, as do patches where a tile reaches over the grid's edge. Padded queries have no weight in
    the averages over queries: our choice as well, the published one is not known to us. Gradients pass through all
    steps. Any grid; cost N^1.5 if blocks are about sqrt(N).

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        num_steps: alternations T; ViT-AdaLA's FLOPs imply 3.
        exact_prefix: whether class and register tokens attend, and are attended to, as in softmax attention.
        tile: (rows, columns) of patches in a block, rows of the grid if None.
        temperature: whether each head's scores have a learnt factor, 1 at first.
        dwconv: side of a convolution of the values that is added, as in `LinearAttention`; None for none.

    Raises:
        ValueError: for fewer than one step, a ``tile`` that is no two positive numbers, or a ``dwconv`` that is even.
    """

    formula = 'ΣL Σ R v: softmax bound to Monarch matrices, T alternating steps'
    cost = '2TN(h+w)D + NwD'
    positional = True
    reference = 'Yaras et al. 2025'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, num_steps: int = 1, exact_prefix: bool = True,
                 tile: tuple[int, int] | None = None, temperature: bool = False, dwconv: int | None = None) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if num_steps < 1:
            raise ValueError(f'num_steps={num_steps} must be at least 1')
        self.num_steps, self.exact_prefix = num_steps, exact_prefix
        self.tile = None if tile is None else check_tile(tile)
        self.tau = nn.ParameterDict({'scale': torch.ones(num_heads, 1, 1)}) if temperature else None
        self.dwconv = None if dwconv is None else DepthwiseConv(dim, dwconv)

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        local = 0 if self.dwconv is None else self.dwconv(v, hw, num_prefix)
        q = q if self.tau is None else q * self.tau['scale'].to(q.dtype)
        tile, scaled = fit_tile(self.tile or (1, hw[1]), hw), q * q.shape[-1] ** -0.5
        prefix, patches = zip(*(x.tensor_split((num_prefix,), dim=2) for x in (scaled, k, v)), strict=True)
        blocks = [to_tiles(x, hw, tile) for x in patches]
        real = real_patches(hw, tile, q.device) if padded(hw, tile) else None
        if num_prefix and not self.exact_prefix:
            first, out = self.with_front(prefix, blocks, real)
        else:
            first = F.scaled_dot_product_attention(q[:, :, :num_prefix], k, v)
            out = monarch_attention(*blocks, self.num_steps, real, prefix[1:] if num_prefix else None)
        return torch.cat([first, from_tiles(out, hw, tile)], dim=2) + local

    def with_front(self, prefix: tuple[Tensor, ...], blocks: list[Tensor],
                   real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Prefix tokens, and blocks, after attention with prefix tokens in blocks of their own, filled up in front."""
        size, count = blocks[0].shape[3], prefix[0].shape[2]
        front = [F.pad(x, (0, 0, -count % size, 0)).unflatten(2, (-1, size)) for x in prefix]
        real = torch.ones_like(blocks[0][0, 0, :, :, 0], dtype=torch.bool) if real is None else real
        real = torch.cat([F.pad(real.new_ones(count), (-count % size, 0)).unflatten(0, (-1, size)), real])
        out = monarch_attention(*(torch.cat(pair, dim=2) for pair in zip(front, blocks, strict=True)), self.num_steps,
                                real)
        first, out = out.tensor_split((front[0].shape[2],), dim=2)
        return first.flatten(2, 3)[:, :, -count:], out
