"""Gated linear attention (Yang et al. 2024): a linear recurrence with a forget gate per channel, chunk by chunk."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.ops.precision import in_float32

CHUNK = 16  # the pairs of a chunk are formed for each channel: memory N * CHUNK * K


@in_float32
def gated_linear_attention(q: Tensor, k: Tensor, log_gate: Tensor, v: Tensor) -> Tensor:
    """``S_t = diag(exp g_t) S_{t-1} + k_t^T v_t``, ``out_t = q_t S_t``, over tokens in order; O(N K D).

    Within a chunk, pairs are weighed by ``exp(b_t - b_s)`` with b the running sum of g: never larger than 1, so
    nothing overflows however strong the gates are. In float32 throughout.

    Args:
        q, k, log_gate: (B, H, N, K); g is not positive.
        v: (B, H, N, D).

    Returns:
        (B, H, N, D).
    """
    n = q.shape[2]
    q, k, g, v = (F.pad(x, (0, 0, 0, -n % CHUNK)).unflatten(2, (-1, CHUNK)) for x in (q, k, log_gate, v))
    b = g.cumsum(dim=3)  # (B, H, chunks, c, K)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)  # s after t
    decay = (b.unsqueeze(4) - b.unsqueeze(3)).masked_fill(later[:, :, None], -torch.inf).exp()  # (..., t, s, K)
    pairs = (q.unsqueeze(4) * decay * k.unsqueeze(3)).sum(-1)  # (..., t, s)
    inside = pairs @ v
    end = b[:, :, :, -1:]
    reaching_end = (k * (end - b).exp()).transpose(-2, -1) @ v  # (..., K, D): what each chunk adds to the state
    q = q * b.exp()
    state, outputs = torch.zeros_like(reaching_end[:, :, 0]), []
    for i in range(q.shape[2]):
        outputs.append(inside[:, :, i] + q[:, :, i] @ state)
        state = end[:, :, i].transpose(-2, -1).exp() * state + reaching_end[:, :, i]
    return torch.cat(outputs, dim=2)[:, :, :n]
