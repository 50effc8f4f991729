from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.tiles import from_tiles, padded, real_patches, to_tiles
from adala_mm.registry import ATTENTIONS

Cells = tuple[Tensor, Tensor, Tensor]  # keys and values (B, H, M, m, D) and counts (M, m) of m members of M cells


def nested_tiles(x: Tensor, hw: tuple[int, int], side: int, levels: int) -> Tensor:
    """(B, H, h w, D) to (B, H, T, side^2, D): the four tiles of each tile that is twice as large follow each other."""
    large = side << (levels - 1)
    out, heads = to_tiles(x, hw, (large, large)), x.shape[1]
    while large > side:
        out = to_tiles(out.flatten(1, 2), (large, large), (large // 2, large // 2))  # (B, H T, 4, (large / 2)^2, D)
        out, large = out.unflatten(1, (heads, -1)).flatten(2, 3), large // 2
    return out


def pyramid(k: Tensor, v: Tensor, count: Tensor, levels: int) -> list[Cells]:
    """Cells of tokens, then cells of four cells, each with its mean key and value, up to one cell of all the coarsest.

    ``k`` and ``v`` (B, H, M, m, D) are zero where ``count`` (M, m), the number of tokens behind a member, is.
    """
    cells = [(k, v, count)]
    for level in range(1, levels + 1):
        group = (1, -1) if level == levels else (-1, 4)
        k, v = (x.sum(dim=3).unflatten(2, group) for x in (k, v))
        count = count.sum(dim=1).unflatten(0, group)
        size = count.clamp_min(1).unsqueeze(-1)
        cells.append((k / size, v / size, count))
    return cells


@ATTENTIONS.register_module()
class CoarseToFineAttention(Attention):
    """Softmax over all that there is, near and important keys one by one, the rest as means of tiles.

    ``out_i = sum_j w_ij v_j / sum_j w_ij`` over class and register tokens, the tokens of open tiles, each with
    ``w_ij = exp(q_i·k_j / sqrt D)``, and the tiles that stay closed, a mean key and value each, with
    ``w_ij = n_j exp(q_i·k_j / sqrt D)``, n_j being the number of their tokens: the softmax of tokens that are all like
    the mean. Queries come in blocks of the patch grid, and a block opens the K tiles with the greatest weight that any
    of its queries gives them while all are closed. With all tiles open, that is softmax attention. Queries of class and
    register tokens take the softmax over all keys, O(N).

    With ``levels=2`` there are tiles of four tiles above them: K of those open into their tiles, K of these into
    tokens; and so on. Every query then meets ``N / (4^(L-1) s^2) + 4 (L-1) K + K s^2`` keys, which with as many levels
    as the grid has is O(N log N). Gradients pass through the weights, not through the choice of tiles. Any grid: where
    a tile reaches over its edge it has fewer tokens. One call of PyTorch's fused attention, in its precision.

    Mean keys beside chosen tiles: Yuan et al. 2025 (Native Sparse Attention, one token a query and as gated branches);
    several levels: Tang et al., ICLR 2022 (QuadTree attention).

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
        prefix, (queries, *patches) = zip(*(x.tensor_split((num_prefix,), dim=2) for x in (q, k, v)), strict=True)
        first = F.scaled_dot_product_attention(prefix[0], k, v)
        queries = to_tiles(queries, hw, block)  # (B, H, L, S, D)
        real = real_patches(hw, block, q.device) if padded(hw, block) else None
        one = q.new_ones(1, 1, hw[0] * hw[1], 1)
        tokens = [nested_tiles(x, hw, self.tile, self.levels) for x in (*patches, one)]  # (B, H, M, s^2, D)
        cells = pyramid(*tokens[:2], tokens[2][0, 0, :, :, 0], self.levels)

        *met, bias = self.met_by(queries, cells, real)
        met = [torch.cat([x.unsqueeze(2).expand(-1, -1, y.shape[2], -1, -1), y], dim=3)
               for x, y in zip(prefix[1:], met, strict=True)]
        bias = F.pad(bias, (num_prefix, 0)).unsqueeze(3)  # (B, H, L, 1, P + keys)
        out = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (queries, *met)), bias.flatten(0, 1))
        return torch.cat([first, from_tiles(out.unflatten(0, batch), hw, block)], dim=2)

    def met_by(self, queries: Tensor, cells: list[Cells], real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, H, L, n, D) that the queries of each block meet, and what their logits get (B, H, L, n).

        ``real`` (L, S) tells queries from padding.
        """
        scaled, total, found = queries.detach() * queries.shape[-1] ** -0.5, None, []
        cell = torch.zeros(*queries.shape[:3], 1, dtype=torch.long, device=queries.device)  # (B, H, L, K)
        for keys, values, count in reversed(cells):
            k, v, bias = opened(keys, cell), opened(values, cell), count.log()[cell].flatten(3)
            if values is not cells[0][1]:
                logits = scaled @ k.detach().mT + bias.unsqueeze(3)  # (B, H, L, S, n)
                total = logits.logsumexp(-1, keepdim=True) if total is None else total
                share = logits - total if real is None else (logits - total).masked_fill(~real[..., None], -torch.inf)
                chosen = share.amax(dim=3).topk(min(self.num_open, k.shape[3])).indices  # (B, H, L, K)
                bias = bias.scatter(-1, chosen, -torch.inf)
                member = torch.arange(count.shape[1], device=cell.device)
                cell = (cell.unsqueeze(-1) * count.shape[1] + member).flatten(3).gather(-1, chosen)
            found.append((k, v, bias))
        k, v, bias = zip(*found, strict=True)
        return torch.cat(k, dim=3), torch.cat(v, dim=3), torch.cat(bias, dim=-1)


def opened(x: Tensor, ids: Tensor) -> Tensor:
    """Members (B, H, L, K m, D) of the cells (B, H, L, K) of x (B, H, M, m, D)."""
    (batch, heads, number), members = x.shape[:3], x.shape[3:]
    offset = number * torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1)
    flat = x.reshape(batch * heads * number, -1).index_select(0, (ids + offset).flatten())
    return flat.view(*ids.shape, *members).flatten(3, 4)
