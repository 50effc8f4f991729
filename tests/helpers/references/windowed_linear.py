"""Exact windows with a linear rest, as one matrix of weights."""
from __future__ import annotations

import math

import torch

from helpers.layers import WIDTH
from helpers.references.baselines import convolved


def near(hw, num_prefix, s):
    """(N, N): whether two tokens stand in one window, or one of them is a class or register token."""
    window = [None] * num_prefix + [(y // s, x // s) for y in range(hw[0]) for x in range(hw[1])]
    return torch.tensor([[a is None or b is None or a == b for b in window] for a in window])


def windowed(layer, q, k, v, hw, num_prefix, large=False):
    """Of our own: the two equations of the layer's docstring, as a matrix of weights."""
    inside = near(hw, num_prefix, layer.window_size)
    k = k - sum(k[:, :, i:i + 1] for i in range(k.shape[2])) / k.shape[2]
    a = torch.stack([q[:, h] @ layer.feature_map.q[h] for h in range(q.shape[1])], dim=1)[:, :, :, None]
    b = torch.stack([k[:, h] @ layer.feature_map.k[h] for h in range(q.shape[1])], dim=1)[:, :, None]
    f, scores = a.shape[-1], q @ k.mT / math.sqrt(WIDTH)
    lengths = (a.square() + b.square()).sum(-1) / (2 * f)
    if large:  # the same, by logarithms
        kernel = torch.logsumexp(torch.cat([a + b, -a - b], dim=-1), dim=-1) - math.log(2 * f) - lengths
        w = torch.where(inside, scores, kernel).softmax(-1)
    else:
        w = torch.where(inside, torch.exp(scores), torch.cosh(a + b).mean(-1) * torch.exp(-lengths))
        w = w / w.sum(-1, keepdim=True)
    out = w @ v
    return out if layer.dwconv is None else out + convolved(v, layer.dwconv, hw, num_prefix)
