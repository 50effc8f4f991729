"""What the Triton kernels ask of tensors, and their launchers of each."""
from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec('triton') is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Coarse-to-fine attention has arrays with one number per cell; their rows are padded to a multiple of this.
PADDED = 64


def takes(q: Tensor) -> bool:
    """Whether there are kernels for queries of this device, dtype and number of channels."""
    return q.device.type == 'cuda' and HAS_TRITON and q.dtype in DTYPES and q.shape[-1] <= 128


def strides(*tensors: Tensor) -> list[int]:
    """Strides over image, head and token of (B, H, N, D); channels are next to each other."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def dense(*tensors: Tensor) -> list[Tensor]:
    """The tensors with their channels next to each other."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
