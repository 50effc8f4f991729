"""Patches in tiles of the grid, and back; some of them. Tiles and the patches in each are row-major."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.ops import exporting


def check_tile(tile: tuple[int, int]) -> tuple[int, int]:
    """``tile`` itself, or a ValueError if it is no pair of positive numbers."""
    if len(tile) != 2 or min(tile) < 1:
        raise ValueError(f'tile={tile} must be (rows, columns) of patches, each at least 1')
    return tuple(tile)


def fit_tile(tile: tuple[int, int], hw: tuple[int, int]) -> tuple[int, int]:
    """``tile`` no larger than the grid, so that nothing is padded in vain; as it is where a graph leaves sizes open."""
    return tile if exporting() else tuple(min(sides) for sides in zip(tile, hw, strict=True))


def count(hw: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles that cover the grid."""
    return tuple((side + length - 1) // length for side, length in zip(hw, tile, strict=True))


def padded(hw: tuple[int, int], tile: tuple[int, int]) -> bool:
    """Whether tiles may reach over the grid's edge; always in an exported graph, which a branch would tie to a size."""
    return exporting() or any(side % length for side, length in zip(hw, tile, strict=True))


def to_tiles(x: Tensor, hw: tuple[int, int], tile: tuple[int, int]) -> Tensor:
    """(B, H, h w, D) to (B, H, T, th tw, D), zeros beyond the right and bottom edge of the grid."""
    (h, w), (th, tw), (rows, columns) = hw, tile, count(hw, tile)
    x = x.unflatten(2, hw)
    if padded(hw, tile):
        x = F.pad(x, (0, 0, 0, columns * tw - w, 0, rows * th - h))
    return x.unflatten(3, (columns, tw)).unflatten(2, (rows, th)).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def nested_tiles(x: Tensor, hw: tuple[int, int], side: int, levels: int) -> Tensor:
    """(B, H, h w, D) to (B, H, T, side^2, D): the four tiles of each tile that is twice as large follow each other."""
    large = side << (levels - 1)
    out, heads = to_tiles(x, hw, (large, large)), x.shape[1]
    while large > side:
        out = to_tiles(out.flatten(1, 2), (large, large), (large // 2, large // 2))  # (B, H T, 4, (large / 2)^2, D)
        out, large = out.unflatten(1, (heads, -1)).flatten(2, 3), large // 2
    return out


def from_tiles(x: Tensor, hw: tuple[int, int], tile: tuple[int, int]) -> Tensor:
    """The inverse of `to_tiles`: (B, H, T, th tw, D) to (B, H, h w, D)."""
    (h, w), (th, tw), (rows, columns) = hw, tile, count(hw, tile)
    x = x.unflatten(3, (th, tw)).unflatten(2, (rows, columns)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    if not padded(hw, tile):
        return x.flatten(2, 3)
    place = torch.arange(h, device=x.device)[:, None] * (columns * tw) + torch.arange(w, device=x.device)
    return x.flatten(2, 3).index_select(2, place.flatten())


def real_patches(hw: tuple[int, int], tile: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(T, th tw): False where a tile reaches over the grid's edge."""
    return to_tiles(torch.ones(1, 1, hw[0] * hw[1], 1, device=device), hw, tile)[0, 0, :, :, 0] > 0


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Rows (B, H, L, n, D) of x (B, H, M, D), by their numbers (B, H, L, n)."""
    batch, heads, rows = x.shape[:3]
    offset = rows * torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1)
    return x.flatten(0, 2).index_select(0, (ids + offset).flatten()).view(*ids.shape, x.shape[-1])
