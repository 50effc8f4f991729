from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.ops import in_float32
from adala_mm.registry import ATTENTIONS


@in_float32
def monarch_attention(q: Tensor, k: Tensor, v: Tensor, block_size: int, num_steps: int, padding: int = 0) -> Tensor:
    """Attention by the Monarch matrix that is closest to softmax's in the variational sense (Yaras et al. 2025).

    Softmax attention is the row-stochastic M that maximises ``<M, q k^T / sqrt D> + entropy(M)``. Here M is bound to
    ``M[(l,j),(k,i)] = L[j,k,l] R[k,j,i]``, the N tokens being m blocks of b: query j of block l, key i of block k.
    From ``L = [k = l]``, each step maximises exactly over R, then over L:

    ``a = sum_l L q / sum_l L``, ``R = softmax_i(a·k)``, then ``L = softmax_k(q·kbar - s)`` with ``kbar = sum_i R k``
    and ``s = sum_i R log R``. The result is ``sum_k L sum_i R v``; its weights sum to 1. One block, or blocks of one
    token, give softmax attention.

    Args:
        q, k, v: (B, H, N, D).
        block_size: b.
        num_steps: at least 1.
        padding: tokens put in front, never seen by others, so that blocks begin where they should; the last block is
            filled up.

    Returns:
        (B, H, N, D).
    """
    n, dim = q.shape[2:]
    behind = -(n + padding) % block_size
    q, k, v = (F.pad(x, (0, 0, padding, behind)).unflatten(2, (-1, block_size)) for x in (q * dim ** -0.5, k, v))
    blocks = q.shape[2]  # each now (B, H, m, b, D)
    place = torch.arange(blocks * block_size, device=q.device).view(blocks, block_size)
    real = (place >= padding) & (place < padding + n)  # (m, b)
    pad_bias = torch.zeros_like(real, dtype=q.dtype).masked_fill(~real, torch.finfo(q.dtype).min)[:, None]  # keys i
    seen = real.to(q.dtype).T[:, None]  # (b, 1, m): queries l that count, for each j

    a = q  # (B, H, k, j, D); where L = [k = l], and the query of a padded place is zero
    for step in range(num_steps):
        if step:
            share = left * seen  # noqa: F821  (B, H, j, k, l)
            total = share.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
            a = ((share / total) @ q.transpose(2, 3)).transpose(2, 3)
        logits = a @ k.transpose(-2, -1) + pad_bias  # (B, H, k, j, i)
        right = logits.softmax(-1)
        mean_key = right @ k  # (B, H, k, j, D)
        # s = sum_i R log R = a·kbar - logsumexp, without a logarithm of zero
        s = (a * mean_key).sum(-1) - logits.logsumexp(-1)  # (B, H, k, j)
        scores = mean_key.transpose(2, 3) @ q.permute(0, 1, 3, 4, 2)  # (B, H, j, k, l)
        left = (scores - s.transpose(2, 3).unsqueeze(-1)).softmax(dim=-2)
    out = left.transpose(-2, -1) @ (right @ v).transpose(2, 3)  # (B, H, j, l, D)
    return out.transpose(2, 3).flatten(2, 3)[:, :, padding:padding + n]


@ATTENTIONS.register_module()
class MonarchAttention(Attention):
    """`monarch_attention` with the rows of the patch grid as blocks, made to replace softmax without training.

    Class and register tokens share a block of their own in front of the first row, filled up with padding. Padded
    queries have no weight in the averages over queries: our choice, the published one is not known to us. Gradients
    pass through all steps. Any grid; cost N^1.5 if blocks are about sqrt(N).

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        num_steps: alternations T; ViT-AdaLA's FLOPs imply 3.
        block_size: tokens in a block, the grid's width if None.

    Raises:
        ValueError: for fewer than one step or token.
    """

    formula = 'ΣL Σ R v: softmax bound to Monarch matrices, T alternating steps'
    cost = '2TN(h+w)D + NwD'
    positional = True
    reference = 'Yaras et al. 2025'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, num_steps: int = 3,
                 block_size: int | None = None) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if num_steps < 1 or (block_size is not None and block_size < 1):
            raise ValueError(f'num_steps={num_steps} and block_size={block_size} must be at least 1')
        self.num_steps = num_steps
        self.block_size = block_size

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        block = self.block_size or hw[1]
        padding = 0 if block >= q.shape[2] else -num_prefix % block  # a single block needs no boundary
        return monarch_attention(q, k, v, block, self.num_steps, padding)
