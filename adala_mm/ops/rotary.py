"""Rotary positions on the patch grid, as DINOv3 has them: queries and keys are turned by where their patch lies."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rotation(NamedTuple):
    """By what the channel pairs of queries and keys are turned.

    Args:
        cos, sin: of the angles, (n, D / 2) for n patches, or anything that broadcasts to (B, H, n, D / 2).
        interleaved: whether pair i is channels 2 i and 2 i + 1, as in EVA-02, instead of i and i + D / 2, as in DINOv3.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


def turn(x: Tensor, rotation: Rotation, num_prefix: int = 0) -> Tensor:
    """Turns each channel pair (a, b) of the patches to ``(a cos - b sin, b cos + a sin)``; prefix tokens stay.

    Args:
        x: (..., N, D), N being ``num_prefix`` and the patches of ``rotation``.

    Returns:
        As ``x`` is, computed in the wider of its dtype and that of the tables.
    """
    cos, sin, interleaved = rotation
    first, patches = x.tensor_split((num_prefix,), dim=-2)
    a, b = (patches[..., 0::2], patches[..., 1::2]) if interleaved else patches.chunk(2, dim=-1)
    turned = a * cos - b * sin, b * cos + a * sin
    turned = (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)
    return torch.cat([first, turned], dim=-2) if num_prefix else turned


class RotaryPositions(nn.Module):
    """Axial rotary positions in normalised coordinates (DINOv3, Siméoni et al. 2025; RoPE: Su et al. 2021).

    A patch in row y of h and column x of w lies at ``(2 (y + 1/2) / h - 1, 2 (x + 1/2) / w - 1)``, both in (-1, 1), so
    that an image of another size has the same corners. Frequency f of F = D / 4 turns a pair of channels by
    ``2 pi coordinate / base^(f / F)``: first the F angles of the row, then those of the column. There is nothing to
    learn and nothing to resample; any grid, in float32.

    Softmax sees ``R_i q·R_j k = q·R_{j-i} k``, which depends on the places of two patches by their difference only.
    (Class and register tokens do not turn: to them each place is another.) A kernel's features do not keep this:
    ``phi(R_i q)·phi(R_j k)`` changes when both places move alike, because phi acts on single channels and a rotation
    mixes them. So a linear attention with such positions is told where in the image its tokens are, not only how far
    apart; docs/method.md has numbers. The rotations of features by which `MLLAAttention` and `RALAAttention` keep
    differences of places come on top, and do not change that.

    In training mode coordinates may be disturbed, once for all images and blocks of a call, in this order; `eval` holds
    them still. It is a module for that alone: there is nothing of it in a state dict.

    Args:
        head_dim: D, a multiple of 4.
        base: of the wave lengths.
        shift: added to each axis, uniform in [-shift, shift]; None for 0.
        jitter: each axis is multiplied by a factor of its own, log-uniform in [1 / jitter, jitter]; None for 1.
        rescale: both axes are multiplied by one factor, log-uniform in [1 / rescale, rescale]; None for 1.

    Raises:
        ValueError: for channels that 4 does not divide, or a number out of its range.
    """

    def __init__(self, head_dim: int, base: float = 100.0, shift: float | None = None, jitter: float | None = None,
                 rescale: float | None = None) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f'{head_dim} channels in a head: rotary positions by row and column need a multiple of 4')
        for name, value, least in (('base', base, 0), ('shift', shift, 0), ('jitter', jitter, 1),
                                   ('rescale', rescale, 1)):
            if value is not None and not least <= value < math.inf or name == 'base' and not base:
                raise ValueError(f'{name}={value} of rotary positions must be '
                                 + ('above 0' if name == 'base' else f'at least {least}') + ' and finite')
        self.head_dim, self.base, self.shift, self.jitter, self.rescale = head_dim, base, shift, jitter, rescale

    def forward(self, hw: Sequence[int], device: torch.device | None = None) -> Rotation:
        """The rotation of the patches, row-major, of a grid (h, w); drawn anew at each call in training mode."""
        exponents = 2.0 * torch.arange(self.head_dim // 4, device=device, dtype=torch.float32) / (self.head_dim // 2)
        periods = self.base ** exponents  # (F,)
        axes = [2.0 * ((torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side) - 1.0 for side in hw]
        if self.training:
            axes = self.disturbed(axes)
        angles = [2 * math.pi * axis[:, None] / periods for axis in axes]  # (h, F), (w, F)

        def table(wave: Callable[[Tensor], Tensor]) -> Tensor:  # (h w, 2 F)
            rows, columns = (wave(angle) for angle in angles)
            return torch.cat([rows[:, None].expand(-1, hw[1], -1), columns.expand(hw[0], -1, -1)], dim=-1).flatten(0, 1)

        return Rotation(table(torch.cos), table(torch.sin))

    def disturbed(self, axes: list[Tensor]) -> list[Tensor]:
        def drawn(count: int, limit: float) -> Tensor:  # on the CPU, whose generator all devices have
            return torch.empty(count).uniform_(-limit, limit)

        shift = torch.zeros(2) if self.shift is None else drawn(2, self.shift)
        jitter = torch.ones(2) if self.jitter is None else drawn(2, math.log(self.jitter)).exp()
        rescale = torch.ones(1) if self.rescale is None else drawn(1, math.log(self.rescale)).exp()
        return [(axis + shift[i].item()) * jitter[i].item() * rescale.item() for i, axis in enumerate(axes)]
