"""Linear attention on the CPU, forward and backward, by the same formulas as the Triton kernels.

Tokens are worked off in chunks that stay in the processor's cache, straight from the qkv projection's memory: phi(q)
and phi(k) exist for one chunk at a time, and nothing of the size of the inputs is made but the output.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 384  # tokens; a few hundred kB for the heads of a ViT
LOG2E = math.log2(math.e)

def _elu1(x: Tensor, out: Tensor, spare: Tensor) -> None:
    """``elu(x) + 1 = 2^(min(x, 0) log2 e) + max(x, 0)``: PyTorch's exp2 takes less than half of the time of its exp."""
    torch.mul(x, LOG2E, out=out).clamp_(max=0).exp2_()
    out += torch.clamp(x, min=0, out=spare)


# phi, written into its second argument, and its derivative at a point from phi there.
PHI: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], Callable[[Tensor], Tensor]]] = {
    'elu1': (_elu1, lambda phi: phi.clamp(max=1)),
    'relu': (lambda x, out, spare: torch.clamp(x, min=0, out=out), lambda phi: (phi > 0).to(phi.dtype)),
    'softplus': (lambda x, out, spare: out.copy_(F.softplus(x)), lambda phi: -torch.expm1(-phi)),
    'identity': (lambda x, out, spare: out.copy_(x), torch.ones_like),
}


def _features(q: Tensor, k: Tensor, phi: Callable, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """phi of a chunk (H, c, D), and as much memory for what is made of it.

    All chunks share both: fresh memory costs more than the arithmetic.
    """
    size = min(CHUNK, max(q.shape[2], k.shape[2]))
    first, second = q.new_empty(2, q.shape[1], size, q.shape[3], dtype=dtype).unbind(0)

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        out, spare = first[:, :x.shape[1]], second[:, :x.shape[1]]
        phi(x.to(dtype), out, spare)
        return out, spare

    return features


def _weights(features: Tensor, total: Tensor, eps: float) -> Tensor:
    """``phi(q)·total + eps`` (H, c, 1), as rows times matrices: six times as fast as matrices times columns."""
    return torch.bmm(total.unsqueeze(1), features.transpose(1, 2)).add_(eps).transpose(1, 2)


def _without_autocast(device: str) -> AbstractContextManager:  # a GPU's too, where it has no room for the kernels
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, length, CHUNK))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def forward(q: Tensor, k: Tensor, v: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N, D), stored as (B, N, H, D) because that is what the output projection reads, and the state.

    Args:
        q, k, v: (B, H, N, D) of any strides; k and v may have another N than q.

    Returns:
        out, ``sum_j phi(k_j)^T v_j`` (B, H, D, D) and ``sum_j phi(k_j)`` (B, H, D), both float32 or float64.
    """
    dtype = _wide(q.dtype)
    phi = _features(q, k, PHI[feature_map][0], dtype)
    b, h, n, d = q.shape
    out = q.new_empty(b, n, h, d).transpose(1, 2)
    state, total = q.new_zeros(b, h, d, d, dtype=dtype), q.new_zeros(b, h, d, dtype=dtype)
    with _without_autocast(q.device.type):
        for i in range(b):
            for part in _chunks(k.shape[2]):
                features, _ = phi(k[i, :, part])  # (H, c, D)
                state[i].baddbmm_(features.transpose(1, 2), v[i, :, part].to(dtype))
                total[i] += features.sum(1)
            for part in _chunks(n):
                features, spare = phi(q[i, :, part])
                sums = torch.bmm(features, state[i], out=spare)
                torch.div(sums, _weights(features, total[i], eps), out=out[i, :, part])
    return out, state, total


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor, total: Tensor,
             grads: tuple[Tensor, Tensor, Tensor], feature_map: str, eps: float) -> None:
    """Writes the gradients of q, k and v into ``grads``, tensors of their shapes; see the Triton kernels."""
    dtype, phi_grad = _wide(q.dtype), PHI[feature_map][1]
    phi = _features(q, k, PHI[feature_map][0], dtype)
    grad_q, grad_k, grad_v = grads
    with _without_autocast(q.device.type):
        for i in range(len(q)):
            grad_state, grad_total = torch.zeros_like(state[i]), torch.zeros_like(total[i])
            for part in _chunks(q.shape[2]):
                features, spare = phi(q[i, :, part])
                weight = _weights(features, total[i], eps)
                grad_sum = grad[i, :, part].to(dtype) / weight
                # The stored output may be rounded to half precision.
                out = torch.bmm(features, state[i], out=spare).div_(weight)
                grad_weight = out.mul_(grad_sum).sum(-1, keepdim=True).neg_()
                grad_features = torch.bmm(grad_sum, state[i].transpose(1, 2))
                grad_features.addcmul_(grad_weight, total[i].unsqueeze(1))
                grad_q[i, :, part] = grad_features.mul_(phi_grad(features))
                grad_state.baddbmm_(features.transpose(1, 2), grad_sum)
                grad_total += torch.bmm(grad_weight.transpose(1, 2), features).squeeze(1)
            for part in _chunks(k.shape[2]):
                features, _ = phi(k[i, :, part])
                grad_v[i, :, part] = torch.bmm(features, grad_state)
                grad_features = torch.bmm(v[i, :, part].to(dtype), grad_state.transpose(1, 2))
                grad_k[i, :, part] = grad_features.add_(grad_total.unsqueeze(1)).mul_(phi_grad(features))
