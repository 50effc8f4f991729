"""Inputs for Triton kernels, and bfloat16 in its interpreter."""
from __future__ import annotations

import numpy as np
import torch


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
