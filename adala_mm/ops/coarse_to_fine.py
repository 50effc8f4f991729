"""Coarse-to-fine attention on one level: a PyTorch operator with Triton kernels, forward and backward, for GPUs.

No key is gathered and no weight is in memory. `CoarseToFineAttention` has the formula, and a plain way for what is not
supported here. First derivatives only.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from adala_mm.ops import kernels
from adala_mm.ops.exporting import exporting, transformed, unwatched
from adala_mm.ops.kernels import PADDED


def supports(q: Tensor) -> bool:
    """Whether `coarse_to_fine` takes these queries, with keys and values like them."""
    return kernels.takes(q) and not exporting() and not transformed()


def coarse_to_fine(q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], tile: int, num_open: int,
                   block: int) -> Tensor:
    """What the queries of patches (B, H, h w, D) get from all keys and values (B, H, P + h w, D), prefix tokens first.

    Args:
        grid: (h, w).
        tile, num_open, block: as in `CoarseToFineAttention`.

    Returns:
        (B, H, h w, D), stored as (B, h w, H, D).
    """
    if not unwatched(q, k, v):
        return fused(q, k, v, grid, tile, num_open, block)[0]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _Fused.apply(q, k, v, grid, tile, num_open, block)
    return _forward(q, k, v, grid, tile, num_open, block)[0]


def _forward(*args) -> tuple[Tensor, ...]:
    from adala_mm.ops import triton_coarse_to_fine
    with torch.cuda.device_of(args[0]):  # Triton launches on the current one
        return triton_coarse_to_fine.forward(*args)


def _backward(*args) -> tuple[Tensor, ...]:
    from adala_mm.ops import triton_coarse_to_fine
    with torch.cuda.device_of(args[0]):
        return triton_coarse_to_fine.backward(*args)


@torch.library.custom_op('adala_mm::coarse_to_fine', mutates_args=())
def fused(q: Tensor, k: Tensor, v: Tensor, grid: list[int], tile: int, num_open: int,
          block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`coarse_to_fine`, and what its backward pass wants.

    Returns:
        out; numbers (B, H, L, K) of the tiles that each block of queries has open, and their first patches; the
        log-sum-exp of queries (B, H, h w); keys and values, and sizes, of tiles and prefix tokens.
    """
    return _forward(q, k, v, grid, tile, num_open, block)


@torch.library.custom_op('adala_mm::coarse_to_fine_backward', mutates_args=())
def fused_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, opened: Tensor, lse: Tensor,
                   cells: Tensor, sizes: Tensor, grid: list[int], tile: int, num_open: int,
                   block: int) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad, q, k, v, out, opened, lse, cells, sizes, grid, tile, num_open, block)


def _squares(grid: list[int], side: int) -> int:
    return -(-grid[0] // side) * -(-grid[1] // side)


@fused.register_fake
def _(q, k, v, grid, tile, num_open, block):
    (b, h, n, d), tiles = q.shape, _squares(grid, tile)
    return (q.new_empty(b, n, h, d).transpose(1, 2),
            q.new_empty(2, b, h, _squares(grid, block), min(num_open, tiles), dtype=torch.int32),
            q.new_empty(b, h, n, dtype=torch.float32), q.new_empty(2, b, h, tiles + k.shape[2] - n, d),
            q.new_empty(-(-(tiles + k.shape[2] - n) // PADDED) * PADDED, dtype=torch.float32))


@fused_backward.register_fake
def _(grad, q, k, v, *others):
    return tuple(torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
                 for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.grid, ctx.tile, ctx.num_open, ctx.block = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *others):
    if grad is None:
        return (None,) * 7
    if transformed():
        raise NotImplementedError('the kernels of coarse-to-fine attention have first derivatives, backwards: take '
                                  'float64 or a CPU for others, where it is made of operators of PyTorch')
    direct = not torch.is_grad_enabled() and unwatched(grad, *ctx.saved_tensors)
    function = _backward if direct else fused_backward  # which tells if it is to be differentiated itself
    return (*function(grad, *ctx.saved_tensors, ctx.grid, ctx.tile, ctx.num_open, ctx.block), *[None] * 4)


class _Fused(torch.autograd.Function):
    """The operator without what PyTorch does for operators, which takes longer on the host than a small image."""

    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        outputs = _forward(*inputs)
        _save(ctx, inputs, outputs)
        return outputs[0]

    backward = staticmethod(once_differentiable(_differentiate))


fused.register_autograd(_differentiate, setup_context=_save)


def _products(q_shape: list[int], k_shape: list[int], grid: list[int], tile: int, num_open: int) -> tuple[int, int]:
    """Multiply-adds of queries with all cells' keys, or values, that choose; and with all keys that they then meet."""
    (b, h, n, d), tiles = q_shape, _squares(grid, tile)
    return b * h * n * d * tiles, b * h * n * d * (tiles + min(num_open, tiles) * tile ** 2 + k_shape[2] - n)


@register_flop_formula(torch.ops.adala_mm.coarse_to_fine)
def _flops(q, k, v, grid, tile, num_open, block, out_shape=None, **kwargs) -> int:
    choice, met = _products(q, k, grid, tile, num_open)
    return 2 * (choice + 2 * met)


@register_flop_formula(torch.ops.adala_mm.coarse_to_fine_backward)
def _backward_flops(grad, q, k, v, out, opened, lse, cells, sizes, grid, tile, num_open, block, out_shape=None,
                    **kwargs) -> int:
    """Five products, as PyTorch counts them for its fused attention: one makes the weights again."""
    return 2 * 5 * _products(q, k, grid, tile, num_open)[1]
