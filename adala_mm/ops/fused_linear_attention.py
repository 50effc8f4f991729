"""Linear attention as PyTorch operators with a hand-written backward pass: Triton on GPUs, chunks on CPUs.

Opaque to autograd, torch.compile and checkpointing, which see one operator with known shapes: what happens inside is
decided by the device of the tensors. First derivatives only: for second ones by ``torch.autograd`` use
`linear_attention_reference`, which ``torch.func`` and forward-mode differentiation get by themselves.
"""
from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adala_mm.ops import cpu_linear_attention
from adala_mm.ops.exporting import exporting, transformed

MAPS = tuple(cpu_linear_attention.PHI)
HAS_TRITON = importlib.util.find_spec('triton') is not None


def _engine(x: Tensor) -> ModuleType:
    if x.device.type == 'cpu':
        return cpu_linear_attention
    from adala_mm.ops import triton_linear_attention
    return triton_linear_attention


def supports(q: Tensor, feature_map: str, k: Tensor | None = None, v: Tensor | None = None) -> bool:
    """Whether the operators below take these tensors; else there is the plain formula."""
    if k is not None and (k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]
                          or not q.dtype == k.dtype == v.dtype):
        return False
    if feature_map not in MAPS or exporting() or transformed():
        return False
    if q.device.type == 'cuda':
        return HAS_TRITON and q.dtype in (torch.float32, torch.bfloat16, torch.float16) and q.shape[-1] <= 128
    return q.device.type == 'cpu'


def needs_no_operator(x: Tensor) -> bool:
    """Whether nobody watches (autograd, torch.compile) and the call of an operator, 0.1 ms on a CPU, can be saved."""
    return x.device.type == 'cpu' and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@torch.library.custom_op('adala_mm::linear_attention', mutates_args=())
def fused(q: Tensor, k: Tensor, v: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N, D), and the state (B, H, D, D) and (B, H, D) that the backward pass wants."""
    return _engine(q).forward(q, k, v, feature_map, eps)


@torch.library.custom_op('adala_mm::linear_attention_backward', mutates_args=())
def fused_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor, total: Tensor, feature_map: str,
                   eps: float) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _engine(q).backward(grad, q, k, v, state, total, grads, feature_map, eps)
    return grads


@torch.library.custom_op('adala_mm::linear_attention_packed', mutates_args=())
def packed(qkv: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a qkv projection (B, N, 3, H, D) as it is; output (B, N, H, D).

    Its gradient is made in one piece, while those of three views would have to be put together.
    """
    out, state, total = _engine(qkv).forward(*_parts(qkv), feature_map, eps)
    return out.transpose(1, 2), state, total


@torch.library.custom_op('adala_mm::linear_attention_packed_backward', mutates_args=())
def packed_backward(grad: Tensor, qkv: Tensor, state: Tensor, total: Tensor, feature_map: str, eps: float) -> Tensor:
    grads = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _engine(qkv).backward(grad.transpose(1, 2), *_parts(qkv), state, total, _parts(grads), feature_map, eps)
    return grads


def _parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3, H, D) to views (B, H, N, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _fake_state(x: Tensor, b: int, h: int, d: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(b, h, d, d, dtype=dtype), x.new_empty(b, h, d, dtype=dtype)


@fused.register_fake
def _(q, k, v, feature_map, eps):
    b, h, n, d = q.shape
    return (q.new_empty(b, n, h, d).transpose(1, 2), *_fake_state(q, b, h, d))


@fused_backward.register_fake
def _(grad, q, k, v, state, total, feature_map, eps):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


@packed.register_fake
def _(qkv, feature_map, eps):
    b, n, _, h, d = qkv.shape
    return (qkv.new_empty(b, n, h, d), *_fake_state(qkv, b, h, d))


@packed_backward.register_fake
def _(grad, qkv, state, total, feature_map, eps):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.feature_map, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(backward):
    def differentiate(ctx, grad, grad_state, grad_total):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        grads = backward(grad, *ctx.saved_tensors, ctx.feature_map, ctx.eps)
        return (*(grads if isinstance(grads, (tuple, list)) else (grads,)), None, None)
    return differentiate


@register_flop_formula([torch.ops.adala_mm.linear_attention, torch.ops.adala_mm.linear_attention_packed])
def _flops(shape, *others, out_shape=None, **kwargs) -> int:
    """For PyTorch's counter: two flops for each multiply-add of ``q (k^T v)`` and of its denominator."""
    if len(shape) == 5:  # packed
        b, nq, _, h, d = shape
        nk = nq
    else:
        (b, h, nq, d), nk = shape, others[0][2]
    return 2 * b * h * d * ((nq + nk) * d + nq)


@register_flop_formula([torch.ops.adala_mm.linear_attention_backward,
                        torch.ops.adala_mm.linear_attention_packed_backward])
def _backward_flops(grad, *shapes, out_shape=None, **kwargs) -> int:
    """Twice those of the forward pass: each of its products has two factors to differentiate, and its sums are kept."""
    return 2 * _flops(*shapes)


fused.register_autograd(_differentiate(fused_backward), setup_context=_save)
packed.register_autograd(_differentiate(packed_backward), setup_context=_save)
