"""Vanilla linear attention (Katharopoulos et al. 2020; ViT-AdaLA eq. 2): the fastest way that fits."""
from __future__ import annotations

import torch
from torch import Tensor

from adala_mm.ops import fused_linear_attention as fused
from adala_mm.ops.plain_linear_attention import check_feature_map, linear_attention_reference


def linear_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: str = 'elu1', eps: float = 1e-6) -> Tensor:
    """Attention with kernel phi(q)·phi(k) in place of exp(q·k), evaluated in O(N D^2).

    ``out_i = phi(q_i) [sum_j phi(k_j)^T v_j] / (phi(q_i) · sum_j phi(k_j) + eps)``

    Sums are float32 whatever the inputs are, also under autocast (float64 inputs stay float64): in float16 the
    denominator would overflow from about 1,000 tokens. There is no D^-1/2: stage 1 absorbs it into the projections.

    One Triton kernel or two on a GPU, cache-sized chunks on a CPU, plain PyTorch for the maps ``softmax`` and ``exp``
    and for heads of more than 128 channels on a GPU. On a CPU with fewer tokens than channels, the cheaper order of
    `weighted_sums`; on a GPU so few tokens are one tile of the kernel in either order.

    Args:
        q, k, v: shape (B, H, N, D); k and v may have another N than q.
        feature_map: one of ``FEATURE_MAPS``.
        eps: added to the denominator, so that a query whose features (nearly) vanish, as ``relu``'s can, gives 0.

    Returns:
        shape (B, H, N, D), dtype of ``v``.

    Raises:
        ValueError: for an unknown ``feature_map``; the message lists the known ones.
    """
    check_feature_map(feature_map)
    if fused.supports(q, feature_map, k, v) and not _few_tokens(q.device, q.shape[2], k.shape[2], q.shape[-1]):
        return fused.attend(feature_map, eps, q, k, v)
    return linear_attention_reference(q, k, v, feature_map, eps)


def linear_attention_packed(qkv: Tensor, feature_map: str = 'elu1', eps: float = 1e-6) -> Tensor:
    """`linear_attention` of a qkv projection as it is, without a copy in either direction.

    Args:
        qkv: (B, N, 3, H, D).

    Returns:
        (B, N, H, D), what the output projection reads.
    """
    check_feature_map(feature_map)
    if fused.supports(qkv, feature_map) and not _few_tokens(qkv.device, qkv.shape[1], qkv.shape[1], qkv.shape[-1]):
        return fused.attend(feature_map, eps, qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return linear_attention_reference(q, k, v, feature_map, eps).transpose(1, 2)


def _few_tokens(device: torch.device, nq: int, nk: int, d: int) -> bool:
    return device.type == 'cpu' and nq * nk * 2 < (nq + nk) * d
