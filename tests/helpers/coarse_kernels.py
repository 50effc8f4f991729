"""The kernels of coarse-to-fine attention against dense weights in float64."""
from __future__ import annotations

import torch
from torch.nn import functional as F

from adala_mm.ops import coarse_to_fine as ops
from helpers.layers import error, with_grads

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def qkv(hw, num_prefix, dim=8, heads=1, dtype=torch.float32, batch=1):
    n = hw[0] * hw[1]
    return [(2 * torch.randn(batch, heads, length, dim)).to(DEVICE, dtype) for length in (n, *[num_prefix + n] * 2)]


def square_of(hw, side):
    """Number of the square of each patch."""
    y, x = (torch.arange(length) // side for length in hw)
    return (y[:, None] * (x[-1] + 1) + x).flatten()


def means(x, hw, tile):
    """Of the patches in each tile, and the logarithm of their number."""
    member = F.one_hot(square_of(hw, tile)).T.double()
    count = member.sum(1)
    return member / count[:, None] @ x[:, :, x.shape[2] - member.shape[1]:], count.log()


def dense(q, k, v, chosen, hw, tile, block):
    """The formula with a weight for each query and token, and each query and tile."""
    (mean_k, size), (mean_v, _) = means(k, hw, tile), means(v, hw, tile)
    opened = torch.zeros(*chosen.shape[:3], len(size), dtype=torch.bool).scatter(-1, chosen.long(), True)
    opened = opened[:, :, square_of(hw, block)]  # (B, H, N, T)
    prefix = torch.ones_like(opened[..., :1]).expand(-1, -1, -1, k.shape[2] - q.shape[2])
    tokens = torch.cat([prefix, opened[..., square_of(hw, tile)]], dim=-1)
    bias = torch.cat([torch.zeros_like(tokens, dtype=q.dtype).masked_fill(~tokens, -torch.inf),
                      size.expand_as(opened).masked_fill(opened, -torch.inf)], dim=-1)
    weights = (q @ torch.cat([k, mean_k], dim=2).mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return weights @ torch.cat([v, mean_v], dim=2)


def costs(q, k, hw, tile, block):
    """(B, H, L, T): logarithm of what it costs each block if a tile stays closed."""
    mean, size = means(k, hw, tile)
    share = (q @ mean.mT * q.shape[-1] ** -0.5 + size).softmax(-1)
    blocks, tiles, patches = square_of(hw, block), square_of(hw, tile), k[:, :, k.shape[2] - q.shape[2]:]
    share = torch.stack([share[:, :, blocks == i].sum(2) for i in range(blocks.max() + 1)], dim=2)
    variance = torch.stack([patches[:, :, tiles == i].var(2, correction=0).sum(-1) for i in range(len(size))], dim=2)
    return (share * variance.unsqueeze(2)).log()


def check(inputs, hw, tile, num_open, block):
    """Output and gradients, given which tiles are open; and that these are those that would cost most."""
    dtype, upstream, opened = inputs[0].dtype, torch.randn_like(inputs[0]), []

    def ours(*inputs):
        out, chosen, *_ = ops.fused(*inputs, list(hw), tile, num_open, block)
        opened.append(chosen[0].cpu())
        return out
    got = with_grads(ours, inputs, upstream)
    doubles = [x.cpu().double() for x in inputs]
    wanted = with_grads(lambda *x: dense(*x, opened[0], hw, tile, block), doubles, upstream.cpu())
    for what, a, b in zip(('out', 'grad q', 'grad k', 'grad v'), got, wanted, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert error(a.cpu(), b, floor=1) < TOLERANCE[dtype], what
    cost = costs(*doubles[:2], hw, tile, block)
    taken = cost.gather(-1, opened[0].long())
    least = cost.topk(min(num_open, cost.shape[-1])).values[..., -1:]
    assert (taken >= least - 10 * TOLERANCE[dtype]).all()
    # A tile that is open twice would leave out another one.
    assert all(len(set(row.tolist())) == row.numel() for row in opened[0].flatten(0, 2))
    return got
