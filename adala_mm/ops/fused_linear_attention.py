"""Linear attention with a hand-written backward pass: Triton on GPUs, chunks on CPUs.

Two ways lead there. A tracer (torch.compile), a mode (FLOP counter, fake tensors) or a tensor subclass sees a PyTorch
operator with known shapes; what happens inside is decided by the device of the tensors. Where none of them looks on,
the kernels are called at once, by an autograd function if there is something to differentiate: what PyTorch does for an
operator takes longer on the host than a small image on a GPU.

Derivatives of derivatives are those of `linear_attention_reference`, which torch.func and forward-mode differentiation
get from the beginning.
"""
from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from adala_mm.ops import cpu_linear_attention, kernels
from adala_mm.ops.exporting import exporting, transformed, unwatched
from adala_mm.ops.plain_linear_attention import linear_attention_reference

MAPS = tuple(cpu_linear_attention.PHI)


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
    # On AMD's GPUs Triton fails on some of the kernels.
    return q.device.type == 'cpu' or kernels.takes(q) and torch.version.hip is None


def attend(feature_map: str, eps: float, *tensors: Tensor) -> Tensor:
    """Linear attention of q, k and v (B, H, N, D), or of a qkv projection (B, N, 3, H, D) as it is.

    Returns:
        of the former (B, H, N, D), of the latter (B, N, H, D).
    """
    if not unwatched(*tensors):
        return (fused if len(tensors) == 3 else packed)(*tensors, feature_map, eps)[0]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _Fused.apply(feature_map, eps, *tensors)
    return _forward(tensors, feature_map, eps)[0]


def _forward(tensors: tuple[Tensor, ...], feature_map: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and the state (B, H, D, D) and (B, H, D) that the backward pass wants."""
    out, state, total = _engine(tensors[0]).forward(*_heads(tensors), feature_map, eps)
    return out if len(tensors) == 3 else out.transpose(1, 2), state, total


def _backward(grad: Tensor, tensors: tuple[Tensor, ...], state: Tensor, total: Tensor, feature_map: str,
              eps: float) -> tuple[Tensor, ...]:
    """Gradients of ``tensors``. That of a projection is made in one piece, and not put together from three."""
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
    grad = grad if len(tensors) == 3 else grad.transpose(1, 2)
    _engine(grad).backward(grad, *_heads(tensors), state, total, _heads(grads), feature_map, eps)
    return grads


def _heads(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k and v (B, H, N, D) as they are, or as views of (B, N, 3, H, D)."""
    return tensors if len(tensors) == 3 else tensors[0].permute(2, 0, 3, 1, 4).unbind(0)


def _gradients(grad: Tensor, tensors: tuple[Tensor, ...], state: Tensor, total: Tensor, feature_map: str,
               eps: float) -> tuple[Tensor, ...]:
    """`_backward`, or the plain formula's if somebody differentiates or batches the backward pass itself."""
    if torch.is_grad_enabled() or transformed():
        def formula(*tensors: Tensor) -> Tensor:
            out = linear_attention_reference(*_heads(tensors), feature_map, eps)
            return out if len(tensors) == 3 else out.transpose(1, 2)
        return torch.func.vjp(formula, *tensors)[1](grad)
    if unwatched(grad, *tensors):
        return _backward(grad, tensors, state, total, feature_map, eps)
    if len(tensors) == 3:
        return fused_backward(grad, *tensors, state, total, feature_map, eps)
    return packed_backward(grad, *tensors, state, total, feature_map, eps),


class _Fused(torch.autograd.Function):

    @staticmethod
    def forward(ctx, feature_map: str, eps: float, *tensors: Tensor) -> Tensor:
        out, *state = _forward(tensors, feature_map, eps)
        ctx.save_for_backward(*tensors, *state)
        ctx.options = feature_map, eps
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        *tensors, state, total = ctx.saved_tensors
        return None, None, *_gradients(grad, tuple(tensors), state, total, *ctx.options)


@torch.library.custom_op('adala_mm::linear_attention', mutates_args=())
def fused(q: Tensor, k: Tensor, v: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N, D) and state."""
    _refuse_tangents(q, k, v)
    return _forward((q, k, v), feature_map, eps)


@torch.library.custom_op('adala_mm::linear_attention_backward', mutates_args=())
def fused_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor, total: Tensor, feature_map: str,
                   eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_tangents(grad, q, k, v)
    return _backward(grad, (q, k, v), state, total, feature_map, eps)


@torch.library.custom_op('adala_mm::linear_attention_packed', mutates_args=())
def packed(qkv: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, N, H, D) of a projection (B, N, 3, H, D), and state."""
    _refuse_tangents(qkv)
    return _forward((qkv,), feature_map, eps)


@torch.library.custom_op('adala_mm::linear_attention_packed_backward', mutates_args=())
def packed_backward(grad: Tensor, qkv: Tensor, state: Tensor, total: Tensor, feature_map: str, eps: float) -> Tensor:
    _refuse_tangents(grad, qkv)
    return _backward(grad, (qkv,), state, total, feature_map, eps)[0]


def _refuse(*args) -> None:
    raise NotImplementedError('the operator adala_mm::linear_attention has neither a forward mode nor a rule for '
                              'torch.func: call adala_mm.ops.linear_attention, which takes the plain formula there')


def _refuse_tangents(*tensors: Tensor) -> None:
    """An operator's kernel does not see tangents (forward-mode differentiation), and would lose them in silence."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        _refuse()


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
    *tensors, feature_map, eps = inputs
    ctx.options = feature_map, eps
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_state, grad_total):
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, state, total = ctx.saved_tensors
    return *_gradients(grad, tuple(tensors), state, total, *ctx.options), None, None


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


_library = torch.library.Library('adala_mm', 'FRAGMENT')
for _operator in (fused, packed):
    _operator.register_autograd(_differentiate, setup_context=_save)
for _operator in (fused, packed, fused_backward, packed_backward):
    _library.impl(_operator._opoverload, _refuse, 'FuncTorchDynamicLayerFrontMode')  # where torch.func comes first
