"""What several attentions are made of beside the projections: tables over the grid, convolutions, gates, rotations."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.ops import Rotation, exporting, same_grid, turn


def require_grid(kind: str, grid: tuple[int, int] | None) -> tuple[int, int]:
    """``grid`` itself, or a ValueError that says how ``kind`` gets one: `AdaLAViT` gives its own."""
    if grid is None:
        raise ValueError(f'{kind} has a table over the patch grid: tell it the grid=(h, w) of the images that it is '
                         'trained on')
    return tuple(grid)


def require_odd(kernel_size: int) -> int:
    """``kernel_size`` itself, or a ValueError: only an odd kernel has a middle to put on the token."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size={kernel_size} must be odd and positive')
    return kernel_size


class GridTable(nn.Module):
    """One learnable value per channel and cell of a patch grid, resampled to any other grid.

    A checkpoint of another grid loads: `fit` resamples what is stored (`load_vit` calls it).

    Args:
        channels: K.
        grid: (h0, w0) of what is stored.
        std: of the initial values; 0 starts with zeros.
        mode: ``bicubic``, or ``bilinear`` as Agent attention has it.
        keep_sum: whether the sum over the grid stays the same when it is resampled, not the values.
    """

    def __init__(self, channels: int, grid: tuple[int, int], std: float = 0.0, mode: str = 'bicubic',
                 keep_sum: bool = False) -> None:
        super().__init__()
        self.mode = mode
        self.keep_sum = keep_sum
        self.weight = nn.Parameter(torch.randn(channels, *grid) * std)

    def fit(self, table: Tensor, hw: tuple[int, int]) -> Tensor:
        """``table`` (K, h0, w0) as (K, h, w)."""
        if same_grid(hw, table.shape[-2:]):
            return table
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        fitted = F.interpolate(table[None], size=tuple(hw), mode=self.mode, align_corners=False)[0]
        return fitted * (table[0].numel() / fitted[0].numel()) if self.keep_sum else fitted

    def forward(self, hw: tuple[int, int]) -> Tensor:
        """The table at grid (h, w), as (K, h, w)."""
        return self.fit(self.weight, hw)


class DepthwiseConv(nn.Module):
    """Depth-wise convolution over the patch grid, zero for class and register tokens.

    Starts at zero, so that a pretrained ViT meets the attention alone at first; published code draws it at random.

    Args:
        channels: C for a kernel per channel, or the channels D of a head for kernels that all heads share.
        kernel_size: odd, else a ValueError.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        require_odd(kernel_size)
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        """(B, H, N, D) to (B, H, N, D)."""
        (h, d), (channels, _, size, _) = x.shape[1::2], self.weight.shape
        patches = x[:, :, num_prefix:].transpose(2, 3).reshape(-1, channels, *hw)  # heads join batch or channels
        out = F.conv2d(patches, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=size // 2, groups=channels)
        # Not by the batch, which the older ONNX exporter takes for a constant here.
        return F.pad(out.reshape(-1, h, d, hw[0] * hw[1]).transpose(2, 3), (0, 0, num_prefix, 0))


class IdentityGate(nn.Linear):
    """A linear gate ``x W^T + b`` that starts as 1, whatever the input: a pretrained ViT meets no gate at first."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)


def grid_means(x: Tensor, side: int) -> Tensor:
    """``adaptive_avg_pool2d`` of (B, C, h, w) to (B, C, side, side)."""
    if not exporting():
        return F.adaptive_avg_pool2d(x, side)
    # As two matrix products: cells of symbolic size, which the operator has not in ONNX.
    cell = torch.arange(side, device=x.device)[:, None]

    def means(length: int) -> Tensor:  # (side, length)
        place = torch.arange(length, device=x.device)
        inside = (place >= cell * length // side) & (place < ((cell + 1) * length + side - 1) // side)
        return inside.to(x.dtype) / inside.sum(dim=1, keepdim=True)

    return means(x.shape[2]) @ x @ means(x.shape[3]).T


def grid_places(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Values (h,) of the rows and (w,) of the columns, each for all patches (h w,), row-major."""
    y, x = torch.meshgrid(rows, columns, indexing='ij')
    return y.flatten(), x.flatten()


def grid_angles(hw: tuple[int, int], num_prefix: int, frequencies: Tensor) -> Tensor:
    """Rotation angles (N, 2 F): row times each of F frequencies, then column times each; prefix tokens turn by 0."""
    rows, columns = grid_places(*(torch.arange(side, device=frequencies.device) for side in hw))
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
    return F.pad(angles, (0, 0, num_prefix, 0))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns channel pair (2 i, 2 i + 1) of each token by its angle i; x (..., N, D), angles (..., N, D / 2)."""
    return turn(x, Rotation(angles.cos(), angles.sin(), interleaved=True))
