from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.tiles import from_tiles, nested_tiles, padded, real_patches, take, to_tiles
from adala_mm.ops import coarse_to_fine as fused
from adala_mm.registry import ATTENTIONS

# Keys and values (B, H, M, D); of the tokens behind each, their number (M,) and the variance of their keys (B, H, M).
Cells = tuple[Tensor, Tensor, Tensor, Tensor]


def pyramid(k: Tensor, v: Tensor, count: Tensor, members: list[int]) -> list[Cells]:
    """Means of as many cells as ``members`` says at each level, the coarsest first, tokens last.

    ``k`` and ``v`` (B, H, N, D) are zero where ``count`` (N,), the number of tokens at a place, is. Variances, which
    have no gradient, are the mean variance of the members plus that of their means.
    """
    cells = [(k, v, count, torch.zeros_like(k[..., 0], dtype=torch.promote_types(k.dtype, torch.float32)))]
    for number in members:
        means, _, counts, variances = (x.detach() for x in cells[0])
        k, v = (x.unflatten(2, (-1, number)).sum(dim=3) for x in (k, v))
        counts = counts.unflatten(0, (-1, number))
        count = counts.sum(dim=1)
        size = count.clamp_min(1)
        mean = k / size.unsqueeze(-1)
        apart = (means.unflatten(2, (-1, number)) - mean.detach().unsqueeze(3)).to(variances).square().mean(dim=4)
        variance = (counts * (variances.unflatten(2, (-1, number)) + apart)).sum(dim=3) / size
        cells.insert(0, (mean, v / size.unsqueeze(-1), count, variance))
    return cells


@ATTENTIONS.register_module()
class CoarseToFineAttention(Attention):
    """Softmax over all that there is, near and important keys one by one, the rest as means of tiles.

    ``out_i = sum_j w_ij v_j / sum_j w_ij`` over class and register tokens, the tokens of open tiles, each with
    ``w_ij = exp(q_i·k_j / sqrt D)``, and the tiles that stay closed, a mean key and value each, with
    ``w_ij = n_j exp(q_i·k_j / sqrt D)``, n_j being the number of their tokens: the softmax of tokens that are all like
    the mean. Queries come in blocks of the patch grid. A block opens the K tiles that would cost it most if they stayed
    closed: those with the greatest ``Var_j sum_i (w_ij / sum_l w_il)``, i being its queries, l all tiles, and Var_j the
    variance of the keys in tile j, mean over channels. Where that is zero, the mean is exact. Queries of class and
    register tokens have all open: softmax, O(N).

    With ``levels=2`` there are tiles of four tiles above them: K of those open into their tiles, K of these into
    tokens; and so on. Every query then meets ``N / (4^(L-1) s^2) + 4 (L-1) K + K s^2`` keys, which with as many levels
    as the grid has is O(N log N). Gradients pass through the weights, not the choice of tiles. Any grid: where a tile
    reaches over its edge it has fewer tokens. On a GPU, one level has kernels that read keys where they are; else they
    are gathered once a block, which takes memory, and go through PyTorch's fused attention.

    Near it: QuadTree attention (Tang et al., ICLR 2022); means and tiles as gated branches (Yuan et al. 2025).

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        tile: side s of a tile, in patches.
        num_open: K.
        block: side of a block of queries, in patches.
        levels: L.

    Raises:
        ValueError: for one of these below 1.
    """

    formula = 'Σw v / Σw over tokens of K open tiles and means of the others, w = n exp(qkᵀ/√D)'
    cost = '3N²D/S² + 2NKS²D'
    positional = True
    reference = 'after Tang et al., ICLR 2022'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, tile: int = 4, num_open: int = 16,
                 block: int = 8, levels: int = 1) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if min(tile, num_open, block, levels) < 1:
            raise ValueError(f'tile={tile}, num_open={num_open}, block={block} and levels={levels} must be at least 1')
        self.tile, self.num_open, self.block, self.levels = tile, num_open, block, levels

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        batch, block = q.shape[:2], (self.block, self.block)
        first, queries = q.split((num_prefix, hw[0] * hw[1]), dim=2)
        first = F.scaled_dot_product_attention(first, k, v)
        if self.levels == 1 and fused.supports(q):
            out = fused.coarse_to_fine(queries, k, v, hw, self.tile, self.num_open, self.block)
            return torch.cat([x.transpose(1, 2) for x in (first, out)], dim=1).transpose(1, 2)
        prefix, patches = zip(*(x.tensor_split((num_prefix,), dim=2) for x in (k, v)), strict=True)
        queries = to_tiles(queries, hw, block)  # (B, H, L, S, D)
        real = real_patches(hw, block, q.device) if padded(hw, block) else None
        one = q.new_ones(1, 1, hw[0] * hw[1], 1)
        k, v, count = (nested_tiles(x, hw, self.tile, self.levels).flatten(2, 3) for x in (*patches, one))
        cells = pyramid(k, v, count[0, 0, :, 0], [self.tile ** 2] + [4] * (self.levels - 1))

        ids, bias = self.met_by(queries, cells, real, num_prefix)
        met = [take(torch.cat([prefix[i], *(cell[i] for cell in cells)], dim=2), ids) for i in (0, 1)]
        out = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (queries, *met, bias.unsqueeze(3))))
        return torch.cat([first, from_tiles(out.unflatten(0, batch), hw, block)], dim=2)

    def met_by(self, queries: Tensor, cells: list[Cells], real: Tensor | None, begin: int) -> tuple[Tensor, Tensor]:
        """Whom the queries of each block meet, as rows (B, H, L, n), and what their logits get, (B, H, L, n).

        ``real`` (L, S) tells queries from padding. All meet the first ``begin`` rows; those of ``cells`` follow.
        """
        def counted(length: int) -> Tensor:
            return torch.arange(length, device=queries.device).expand(*queries.shape[:3], -1)

        scaled, total = queries.detach() * queries.shape[-1] ** -0.5, None
        ids, rows = counted(cells[0][2].shape[0]), [counted(begin)]
        biases = [torch.zeros_like(rows[0], dtype=queries.dtype)]
        for level, (keys, _, count, variance) in enumerate(cells):
            bias = count.log()[ids]  # (B, H, L, n)
            rows.append(ids + begin)
            begin += count.shape[0]
            if level + 1 < len(cells):
                logits = scaled @ take(keys.detach(), ids).mT + bias.unsqueeze(3)  # (B, H, L, S, n)
                total = logits.logsumexp(-1, keepdim=True) if total is None else total
                share = logits - total if real is None else (logits - total).masked_fill(~real[..., None], -torch.inf)
                cost = share.logsumexp(dim=3) + take(variance.unsqueeze(3), ids).squeeze(4).log()  # of staying closed
                chosen = cost.topk(min(self.num_open, ids.shape[3])).indices  # (B, H, L, K)
                bias = bias.scatter(-1, chosen, -torch.inf)
                members = self.tile ** 2 if level + 2 == len(cells) else 4
                ids = (ids.gather(-1, chosen).unsqueeze(-1) * members + counted(members).unsqueeze(3)).flatten(3)
            biases.append(bias)
        return torch.cat(rows, dim=-1), torch.cat(biases, dim=-1)
