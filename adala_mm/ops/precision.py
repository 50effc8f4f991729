"""Sums over thousands of tokens need more than half precision, whatever surrounds them."""
from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator: the function's tensors come in as float32 and outside of autocast; its result leaves as they came.

    In float16 the denominator of linear attention overflows from about 1,000 tokens, in bfloat16 its sums keep 8
    bits. float64 stays float64, for tests.
    """
    @functools.wraps(function)
    def wide(*args, **kwargs) -> Tensor:
        # In a trace by torch.jit, sizes are tensors as well, of integers.
        values = [isinstance(arg, Tensor) and arg.is_floating_point() for arg in args]
        last = [arg for arg, is_value in zip(args, values, strict=True) if is_value][-1]
        dtype, device = last.dtype, last.device.type
        target = torch.promote_types(dtype, torch.float32)
        args = [arg.to(target) if is_value else arg for arg, is_value in zip(args, values, strict=True)]
        with nullcontext() if device == 'meta' else torch.autocast(device, enabled=False):
            return function(*args, **kwargs).to(dtype)
    return wide
