"""Tokens as heads, and back."""
from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) to (B, H, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


def centred(k: Tensor) -> Tensor:
    """Keys (B, H, N, D) less their mean over the tokens: softmax does not notice, kernels approximate it better."""
    return k - k.mean(dim=2, keepdim=True)
