from __future__ import annotations

import torch
from torch import Tensor, nn

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.parts import DepthwiseConv
from adala_mm.ops import in_float32
from adala_mm.registry import ATTENTIONS


class ContextMLP(nn.Module):
    """``W2 max(a, b)`` with ``[a, b] = W1 x``: C to 2 C / r, the larger of two halves, back to C (competition)."""

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        if not 1 <= reduction <= dim:
            raise ValueError(f'reduction={reduction} does not lie between 1 and the width {dim}')
        hidden = dim // reduction
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.maximum(*self.fc1(x).chunk(2, dim=-1)))


@ATTENTIONS.register_module()
class FCViTAttention(Attention):
    """Global context of FCViT, broadcast by similarity (Ma et al. 2022, arXiv 2212.12552), O(N C).

    ``s_hn = (mean_n k_hn)·q_hn / sqrt D``, standardised over all heads and tokens of an image,
    ``out_n = (w_h s_hn + b_h) MLP(mean_n v) + dwconv11x11(v)_n``. In FCViT one x stands where q, k and v stand here;
    thus a pretrained ViT's projections keep a part each. Its token mixer does this twice, and there convolutions see
    the sum of x and context, followed by 1 x 1 bottlenecks with GELU; here one convolution stands beside the context
    and starts at 0. Its code also has a plain MLP, ``W2 gelu(W1 x)``, in the place of `ContextMLP`, unused in published
    models. Class and register tokens are tokens like others, but see no convolution. Any grid. Similarities in float32.

    Tokens exchange nothing but one vector per image, so this is a bound from below for what attention is worth.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        reduction: r of `ContextMLP`.
        kernel_size: of the convolution.
        eps: added to the standard deviation.

    Raises:
        ValueError: for a ``reduction`` that leaves no channel, or an even ``kernel_size``.
    """

    formula = 'sim(q, mean k) MLP(mean v) + dwconv v'
    cost = '2ND'
    positional = True
    reference = 'Ma et al. 2022'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, reduction: int = 8, kernel_size: int = 11,
                 eps: float = 1e-5) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        self.eps = eps
        self.context = ContextMLP(dim, reduction)
        self.similarity = nn.ParameterDict({'weight': torch.ones(num_heads, 1, 1),
                                            'bias': torch.zeros(num_heads, 1, 1)})
        self.dwc = DepthwiseConv(dim, kernel_size)

    @in_float32
    def similarities(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, H, N, 1)."""
        score = q @ k.mean(dim=2).unsqueeze(-1) * q.shape[-1] ** -0.5
        std, mean = torch.std_mean(score, dim=(1, 2), keepdim=True)
        return self.similarity['weight'] * (score - mean) / (std + self.eps) + self.similarity['bias']

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        mean = v.mean(dim=2)  # (B, H, D)
        context = self.context(mean.flatten(1)).view_as(mean).unsqueeze(2)
        return self.similarities(q, k) * context + self.dwc(v, hw, num_prefix)
