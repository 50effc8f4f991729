"""Whether a graph is made that has to stand alone: without this package, and for sizes other than the traced one."""
from __future__ import annotations

from collections.abc import Sequence

import torch


def exporting() -> bool:
    """Whether torch.export or an ONNX exporter runs; Dynamo's own `is_exporting` is true when it only compiles."""
    return getattr(torch.compiler, '_is_exporting_flag', False) or torch.onnx.is_in_onnx_export()


def same_grid(hw: Sequence[int], stored: Sequence[int]) -> bool:
    """Whether (h, w) is what is stored; never for a graph with free sizes, which a branch would tie to one."""
    free = exporting() and not all(isinstance(side, int) for side in hw)
    return not free and tuple(hw) == tuple(stored)
