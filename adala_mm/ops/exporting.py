"""What watches: a tracer whose graph has to stand alone, or a transform that differentiates or batches."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import Parameter


def exporting() -> bool:
    """Whether a graph is made that needs no code of this package, for sizes other than the traced one.

    By ``torch.export``, an ONNX exporter, ``torch.jit.trace`` or ``make_fx``. Not by ``torch.compile``, although
    Dynamo's own `is_exporting` is true then as well.
    """
    if torch.compiler.is_dynamo_compiling():
        return getattr(torch.compiler, '_is_exporting_flag', False)
    return (getattr(torch.compiler, '_is_exporting_flag', False) or torch.onnx.is_in_onnx_export()
            or torch.jit.is_tracing() or get_proxy_mode() is not None)


def transformed() -> bool:
    """Whether ``torch.func`` (vmap, grad, jvp, ...) or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unwatched(*tensors: Tensor) -> bool:
    """Whether nothing but autograd looks on: no tracer, no mode that sees operators, no kind of tensor of its own."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return all(type(x) in (Tensor, Parameter) and not is_legacy_batchedtensor(x) for x in tensors)


def same_grid(hw: Sequence[int], stored: Sequence[int]) -> bool:
    """Whether (h, w) is what is stored; never for a graph with free sizes, which a branch would tie to one."""
    free = exporting() and not all(isinstance(side, int) for side in hw)
    return not free and tuple(hw) == tuple(stored)
