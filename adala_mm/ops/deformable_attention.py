"""Multi-scale deformable attention in PyTorch (Deformable DETR, Zhu et al. 2021, eq. 3), for mmcv without its ops."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def ms_deform_attn(value: Tensor, shapes: Tensor | Sequence[tuple[int, int]], locations: Tensor,
                   weights: Tensor) -> Tensor:
    """Weighted sum of values sampled bilinearly at a few points on every level.

    ``out_q = sum_l sum_p weights[q, l, p] * bilinear(value_l, locations[q, l, p])`` per head; a point (x, y) in [0, 1]
    addresses the level's full extent (pixel centres at (i + 0.5) / size), and outside of it the value is zero.

    Args:
        value: (B, sum_l h_l * w_l, H, D), levels one after the other, each row-major.
        shapes: (L, 2) integers, (h_l, w_l); or pairs, which may be symbolic.
        locations: (B, Q, H, L, P, 2), (x, y).
        weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H * D), dtype of ``value``.
    """
    batch, _, heads, dim = value.shape
    _, queries, _, levels, points, _ = locations.shape
    sizes = [(int(h), int(w)) for h, w in shapes.tolist()] if isinstance(shapes, Tensor) else shapes
    out = value.new_zeros(batch * heads, dim, queries)
    for level, part in enumerate(value.split([h * w for h, w in sizes], dim=1)):
        grid = part.permute(0, 2, 3, 1).reshape(batch * heads, dim, *sizes[level])
        where = locations[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2) * 2 - 1
        sampled = F.grid_sample(grid, where.to(grid.dtype), align_corners=False)  # (B*H, D, Q, P)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        out = out + (sampled * weight.to(grid.dtype)).sum(dim=-1)  # one level at a time: 1/L of the memory
    return out.reshape(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)  # autocast may have widened it


def ms_deform_attn_forward(value: Tensor, shapes: Tensor, level_start: Tensor, locations: Tensor, weights: Tensor,
                           im2col_step: int = 64) -> Tensor:
    """`ms_deform_attn` with the signature of mmcv's compiled op (``level_start``, ``im2col_step`` are not needed)."""
    return ms_deform_attn(value, shapes, locations, weights)


def ms_deform_attn_backward(value: Tensor, shapes: Tensor, level_start: Tensor, locations: Tensor, weights: Tensor,
                            grad_output: Tensor, grad_value: Tensor, grad_locations: Tensor, grad_weights: Tensor,
                            im2col_step: int = 64) -> None:
    """Gradients of `ms_deform_attn_forward`, written into the three ``grad_*`` tensors as mmcv's compiled op does."""
    inputs = [t.detach().requires_grad_() for t in (value, locations, weights)]
    with torch.enable_grad():
        out = ms_deform_attn(inputs[0], shapes, inputs[1], inputs[2])
    grads = torch.autograd.grad(out, inputs, grad_output.to(out.dtype))
    for target, grad in zip((grad_value, grad_locations, grad_weights), grads, strict=True):
        target.copy_(grad)
