"""Inputs for Triton kernels, and bfloat16 in its interpreter."""
from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from adala_mm.models.attentions import build_attention
from helpers import LINEAR


def handle_bfloat16(monkeypatch):
    """As a GPU does: the interpreter cuts digits off where that rounds, and multiplies bits as if they were numbers.

    It stores bfloat16 as 16-bit integers.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_or_round(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) == (tl.bfloat16, tl.float32):
            return widen(x)
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        rounded = torch.from_numpy(np.array(x.data, np.float32)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16), tl.bfloat16)
    monkeypatch.setattr(InterpreterBuilder, 'cast_impl', cast_or_round)
    monkeypatch.setattr(InterpreterBuilder, 'create_dot',
                        lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest))


def fenced(x):
    """A larger tensor of NaN, and a view of it that holds ``x``."""
    field = x.new_full([size + 3 for size in x.shape], torch.nan)
    field[1:-2, 1:-2, 1:-2, 1:-2] = x
    return field, field[1:-2, 1:-2, 1:-2, 1:-2]


PHI = {
    'elu1': lambda x: F.elu(x) + 1,
    'relu': torch.relu,
    'softplus': lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    'identity': lambda x: x,
}
MAPS = list(PHI)
WHAT = ('out', 'grad q', 'grad k', 'grad v')
KINDS = {
    'random': lambda *shape: torch.randn(shape),
    'large': lambda *shape: 30 * torch.randn(shape),
    'tiny': lambda *shape: 1e-4 * torch.randn(shape),
    'negative': lambda *shape: torch.randn(shape) - 20,
}
LAYOUTS = {
    'tokens first': lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    'channels not last': lambda x: x.mT.contiguous().mT,
    'every second channel': lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    'one head': lambda x: x[:, :1].expand(x.shape),
    'one token': lambda x: x[:, :, :1].expand(x.shape),
    'one channel': lambda x: x[..., :1].expand(x.shape),
    'one number': lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


def naive(q, k, v, name, eps):
    """The formula with its N x N weights."""
    weights = torch.einsum('bhid,bhjd->bhij', PHI[name](q), PHI[name](k))
    return torch.einsum('bhij,bhjd->bhid', weights / (weights.sum(-1, keepdim=True) + eps), v)


def with_grads(function, inputs, upstream):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def exact(inputs, upstream, name, eps=1e-6):
    return with_grads(lambda *x: naive(*x, name, eps), [x.cpu().double() for x in inputs], upstream.cpu())


def qkv(name, batch, heads, n, m, dim, kind='random', dtype=torch.float32, device='cpu'):
    """Queries, keys and values, and a gradient of the output."""
    q, k = (KINDS[kind](batch, heads, length, dim) for length in (n, m))
    if name == 'identity':  # features that are there already
        q, k = (x.abs() + 0.1 * x.abs().mean() for x in (q, k))
    v, upstream = (torch.randn(batch, heads, length, dim) for length in (m, n))
    return [x.to(device, dtype) for x in (q, k, v)], upstream.to(device, dtype)


def directly(engine, inputs, upstream, name, eps=1e-6, grads=None):
    """Output and gradients by an engine's two functions."""
    out, state, total = engine.module.forward(*inputs, name, eps)
    assert state.dtype == total.dtype == torch.promote_types(out.dtype, torch.float32)
    grads = [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in inputs] \
        if grads is None else grads
    engine.module.backward(upstream, *inputs, state, total, grads, name, eps)
    return [out, *grads]


def check(got, wanted, tolerance, floor=0.0, errors=(0.0, 0.0, 0.0, 0.0)):
    """Errors relative to the largest value, or to ``floor`` if q and k have no gradient; or no more than ``errors``."""
    assert len(got) == len(wanted) == len(WHAT)
    for what, a, b, allowed in zip(WHAT, got, wanted, errors, strict=True):
        assert a.shape == b.shape
        scale = max(float(b.abs().max()), floor if what in WHAT[1:3] else 0.0)
        limit = max(tolerance * scale, allowed) + torch.finfo(a.dtype).tiny * torch.finfo(a.dtype).eps
        error = float((a.detach().cpu().double() - b).abs().max())
        assert error <= limit, f'{what}: {error:.1e} > {limit:.1e}, of {scale:.1e}'


def layer_and_input(device='cpu', tokens=70, **options):
    layer = build_attention(LINEAR | options, 64, 2).to(device)
    return layer, torch.randn(2, tokens, 64, device=device, requires_grad=True)


def layer_grads(layer, x, function=None):
    out = (layer if function is None else function)(x, (10, 7), 0)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])]
