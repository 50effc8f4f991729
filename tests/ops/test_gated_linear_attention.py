"""Gated linear attention in chunks against its recurrence."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from adala_mm.ops import gated_linear_attention
from helpers.layers import error, with_grads


def recurrence(q, k, log_gate, v):
    state, outputs = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=v.dtype), []
    for t in range(q.shape[2]):
        state = log_gate[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, :, None] * state).sum(2))
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize('n', [1, 15, 16, 17, 50])
@pytest.mark.parametrize('gate', ['usual', 'open', 'closed', 'mixed'])
def test_gated_linear_attention(n, gate):
    q, k, g, v = (torch.randn(2, 3, n, width, dtype=torch.float64) for width in (6, 6, 6, 10))
    g = {'usual': nn.functional.logsigmoid(g) / 16, 'open': 0 * g, 'closed': -100 + 0 * g,
         'mixed': torch.where(g > 1, -100.0, -g.abs() / 10)}[gate]
    upstream = torch.randn(2, 3, n, 10, dtype=torch.float64)
    wanted = with_grads(recurrence, (q, k, g, v), upstream)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        got = with_grads(gated_linear_attention, [t.to(dtype) for t in (q, k, g, v)], upstream)
        for what, a, b in zip(('out', 'q', 'k', 'gate', 'v'), got, wanted, strict=True):
            assert a.isfinite().all() and error(a, b, floor=1) < tolerance, what
