from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.heads import centred
from adala_mm.ops import in_float32, weighted_sums
from adala_mm.registry import ATTENTIONS


def orthogonal_features(num_features: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """(M, D): rows orthogonal in blocks of D, with the lengths of Gaussian vectors, in float32 on the CPU.

    Signs are set so that directions are uniform: as QR leaves them, which published code uses, the estimate is biased.
    """
    blocks = []
    for _ in range(math.ceil(num_features / dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
        blocks.append((q * r.diagonal().sign()).T)
    lengths = torch.randn(num_features, dim, generator=generator).norm(dim=1, keepdim=True)
    return lengths * torch.cat(blocks)[:num_features]


KERNELS = ('softmax', 'relu')


class RandomFeatures(nn.Module):
    """``phi(x) = M^-1/2 (f(x') + eps)`` with ``x' = x / D^1/4``; w_r, the rows of the projection, is a saved buffer.

    f is ``exp(w_r·x' - |x'|^2 / 2 - c)`` for the kernel ``softmax``, ``relu(w_r·x')`` for ``relu``.
    """

    def __init__(self, num_features: int, dim: int, eps: float, kernel: str = 'softmax') -> None:
        super().__init__()
        self.eps = eps
        self.kernel = kernel
        self.register_buffer('projection', orthogonal_features(num_features, dim))  # (M, D)

    def forward(self, x: Tensor, shift_over: tuple[int, ...]) -> Tensor:
        """(B, H, N, D) to (B, H, N, M). c, the largest w·x' over ``shift_over``, cancels up to eps."""
        x = x * x.shape[-1] ** -0.25
        wx = x @ self.projection.to(x.dtype).T
        if self.kernel == 'relu':
            return len(self.projection) ** -0.5 * (F.relu(wx) + self.eps)
        shift = wx.detach().amax(dim=shift_over, keepdim=True)
        half_norm = x.square().sum(-1, keepdim=True) / 2
        return len(self.projection) ** -0.5 * (torch.exp(wx - half_norm - shift) + self.eps)


@ATTENTIONS.register_module()
class PerformerAttention(Attention):
    """FAVOR+: random features whose products estimate softmax's kernel (Choromanski et al. 2021, arXiv 2009.14794).

    ``out_i = phi(q_i) [sum_j phi(k_j)^T v_j] / (phi(q_i) · sum_j phi(k_j))`` with the positive features of
    `RandomFeatures`; c is taken per query, and per head of an image for keys. The variance grows as
    ``exp(|q|^2 + |k|^2)``: with queries and keys as long as DINOv2's the estimate is poor until training shortens
    them. Position-free, any number of tokens. In float32 throughout.

    The features are a buffer, shared by heads and kept in checkpoints, so evaluation is deterministic. `redraw` draws
    new ones; `RedrawFeaturesHook`, in the default hooks of our configs, calls it every ``redraw_interval`` iterations.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        num_features: M, ``int(D ln D)`` if None (ViT-AdaLA's FLOPs imply M = D).
        eps: added to each feature; published code has 1e-3 with ``relu``.
        redraw_interval: training iterations between new features; None for never.
        center_keys: whether features are of the keys less their mean over the image (`centred`): the same attention,
            estimated with less variance.
        kernel: ``softmax``, or ``relu``, the paper's generalized attention: no estimate of softmax, and cheaper.

    Raises:
        ValueError: for an unknown ``kernel``, or less than one feature.
    """

    formula = 'φ(q)·Σφ(k)ᵀv / φ(q)·Σφ(k), φ(x) = exp(Wx − |x|²/2), W random'
    cost = '4NMD'
    reference = 'Choromanski et al., ICLR 2021'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, num_features: int | None = None,
                 eps: float = 1e-4, redraw_interval: int | None = 1000,
                 center_keys: bool = False, kernel: str = 'softmax') -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if kernel not in KERNELS:
            raise ValueError(f'unknown kernel {kernel!r}; choose one of {", ".join(KERNELS)}')
        head_dim = dim // num_heads
        num_features = max(1, int(head_dim * math.log(head_dim))) if num_features is None else num_features
        if num_features < 1:
            raise ValueError(f'num_features={num_features}: at least one feature is needed')
        self.redraw_interval = redraw_interval
        self.center_keys = center_keys
        self.feature_map = RandomFeatures(num_features, head_dim, eps, kernel)

    def redraw(self, generator: torch.Generator) -> None:
        """Replaces the random features in place; ``generator`` lives on the CPU, so all processes draw the same."""
        projection = self.feature_map.projection
        projection.copy_(orthogonal_features(*projection.shape, generator=generator))

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        k = centred(k) if self.center_keys else k
        total, weight = weighted_sums(self.feature_map(q, (-1,)), self.feature_map(k, (-2, -1)), v)
        return total / weight
