"""Whether a graph is made that has to stand alone: without this package, and for sizes other than the traced one."""
from __future__ import annotations

import torch


def exporting() -> bool:
    """Whether torch.export or an ONNX exporter runs; Dynamo's own `is_exporting` is true when it only compiles."""
    return getattr(torch.compiler, '_is_exporting_flag', False) or torch.onnx.is_in_onnx_export()
