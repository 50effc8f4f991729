from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.heads import merge_heads
from adala_mm.ops import Rotation, exporting, in_float32
from adala_mm.registry import ATTENTIONS

KERNELS = {
    'identity': lambda x: x,
    'relu': F.relu,
    'leaky_relu': F.leaky_relu,
    'exp': lambda x: torch.exp(0.2 * x),
}


class GeneratedConv(nn.Module):
    """Depth-wise 3 x 3 convolution whose kernels are made from the image's mean token, zero for prefix tokens.

    ``Conv1d(C, C, groups=H) -> GELU -> Conv1d(C, 9 C, groups=H)`` on one position; channel c owns outputs 9 c to
    9 c + 8. The last layer starts at zero, so that a pretrained ViT meets the attention alone at first.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv1d(dim, dim, 1, groups=num_heads)
        self.fc2 = nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        """Input tokens x (B, N, C) and values (B, H, N, D) to (B, H, N, D)."""
        b, h, n, d = v.shape
        kernels = self.fc2(F.gelu(self.fc1(x.mean(dim=1).unsqueeze(-1))))  # (B, 9 C, 1)
        if exporting():  # ONNX has no convolution with as many groups as the batch asks for
            kernels = kernels.reshape(-1, h * d, 3, 3, 1, 1).to(v.dtype)
            grid = F.pad(v[:, :, num_prefix:].transpose(2, 3).reshape(-1, h * d, *hw), (1, 1, 1, 1))
            out = sum(kernels[:, :, i, j] * grid[:, :, i:i + hw[0], j:j + hw[1]] for i in range(3) for j in range(3))
            return F.pad(out.reshape(-1, h, d, hw[0] * hw[1]).transpose(2, 3), (0, 0, num_prefix, 0))
        kernels = kernels.reshape(b * h * d, 1, 3, 3).to(v.dtype)
        patches = v[:, :, num_prefix:].transpose(2, 3).reshape(1, b * h * d, *hw)  # every image its own channels
        out = F.conv2d(patches, kernels, padding=1, groups=b * h * d) if b else patches  # groups have to be positive
        return F.pad(out.reshape(b, h, d, hw[0] * hw[1]).transpose(2, 3), (0, 0, num_prefix, 0))


@ATTENTIONS.register_module()
class InLineAttention(Attention):
    """Injective linear attention: weights that sum to 1 by subtraction (Han et al. 2024, arXiv 2412.06590).

    ``out_i = mean_j v_j + phi(q_i) [sum_j (phi(k_j) - mean phi(k))^T v_j] / (N sqrt D) + conv(v)_i``, where conv is a
    3 x 3 convolution with kernels made from the image (`GeneratedConv`). Nothing is divided, so nothing can blow up;
    weights may be negative. Class and register tokens are tokens like others, but see no convolution (which
    starts at 0). Any grid. In float32 throughout.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        kernel: phi, one of ``identity``, ``relu``, ``leaky_relu``, ``exp`` (of x / 5).
        local: whether the convolution is there.

    Raises:
        ValueError: for an unknown ``kernel``.
    """

    formula = 'mean v + φ(q)·Σ(φ(k) − mean φ(k))ᵀv / (N√D) + conv v, kernels from mean x'
    cost = '2ND²'
    positional = True
    reference = 'Han et al., NeurIPS 2024'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, kernel: str = 'identity',
                 local: bool = True) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if kernel not in KERNELS:
            raise ValueError(f'unknown kernel {kernel!r}; choose one of {", ".join(KERNELS)}')
        self.kernel = kernel
        self.local = GeneratedConv(dim, num_heads) if local else None

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        q, k = KERNELS[self.kernel](q), KERNELS[self.kernel](k)
        k = (k - k.mean(dim=2, keepdim=True)) * (q.shape[-1] ** -0.5 / k.shape[2])
        return v.mean(dim=2, keepdim=True) + q @ (k.transpose(-2, -1) @ v)

    def attend(self, x: Tensor, hw: tuple[int, int], num_prefix: int, rotation: Rotation | None = None) -> Tensor:
        q, k, v = self.turned(x, hw, num_prefix, rotation)
        out = self.mix(q, k, v, hw, num_prefix)
        return merge_heads(out if self.local is None else out + self.local(x, v, hw, num_prefix))


@ATTENTIONS.register_module()
class ViTALiTyAttention(InLineAttention):
    """Softmax's first-order Taylor expansion around centred keys (Dass et al. 2023, arXiv 2211.05109, Algorithm 1).

    ``out_i = (sum_j v_j + q_i G / sqrt D) / (N + q_i · sum_j k_j / sqrt D)``, ``G = k^T v``, the keys less their mean:
    so the denominator is N, and this is `InLineAttention` with the identity as kernel and no convolution. The sparse
    softmax residual of ViTALiTy's own training (quantised, quadratic, dropped at inference) is left out.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
    """

    formula = 'mean v + q·Σ(k − mean k)ᵀv / (N√D)'
    positional = False
    reference = 'Dass et al., HPCA 2023'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__(dim, num_heads, qkv_bias, kernel='identity', local=False)
