from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.parts import DepthwiseConv, grid_places, rotate
from adala_mm.registry import ATTENTIONS


@ATTENTIONS.register_module()
class RMTAttention(Attention):
    """Manhattan self-attention of RMT (Fan et al. 2024, arXiv 2309.11523): softmax that fades with distance.

    ``out = softmax_j(rope(q_i)·rope(k_j) / sqrt D + log(gamma_h) (|dy| + |dx|)) v + dwconv5x5(v)``, with
    ``gamma_h = 1 - 2^(-2 - r h / H)`` for head h = 0 ... H - 1. The rotation counts tokens row by row, D / 2
    frequencies ``10000^-linspace(0, 1, D / 2)``. The published code adds log gamma inside the softmax; the paper's
    equation multiplies after it.

    Not linear: O(N^2 D). ``decomposed`` attends along rows (w tokens each), then the result along columns, for
    O(N (h + w) D). Class and register tokens, absent from the paper, have place 0 and no decay and see no
    convolution (which starts at 0); rows and columns have no room for them.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        decay_range: r.
        decomposed: rows, then columns, instead of all pairs.

    Raises:
        ValueError: if D is odd or r negative, and for inputs with prefix tokens when ``decomposed``.
    """

    formula = 'softmax(rope q·rope k/√D + log γ (|Δy| + |Δx|)) v + dwconv v'
    cost = '2N²D'
    positional = True
    reference = 'Fan et al., CVPR 2024'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, decay_range: float = 4.0,
                 decomposed: bool = False) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if dim // num_heads % 2:
            raise ValueError(f'{dim // num_heads} channels in a head: the rotation needs an even number')
        if decay_range < 0:
            raise ValueError(f'decay_range={decay_range} must not be negative: gamma would leave (0, 1)')
        self.decay_range = decay_range
        self.decomposed = decomposed
        self.lepe = DepthwiseConv(dim, 5)

    def log_decay(self, distance: Tensor) -> Tensor:
        """(M, M) distances to (1, H, M, M) of what is added to the scores."""
        heads = torch.arange(self.num_heads, device=distance.device, dtype=distance.dtype)
        gamma = 1 - 2 ** (-2 - self.decay_range * heads / self.num_heads)
        return (gamma.log()[:, None, None] * distance)[None]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        if self.decomposed and num_prefix:
            raise ValueError(f'RMTAttention along rows and columns has no place for {num_prefix} class and register '
                             'tokens: use decomposed=False, or a ViT without them')
        local = self.lepe(v, hw, num_prefix)
        wide = torch.promote_types(q.dtype, torch.float32)  # for angles that grow with the number of tokens
        n, dim = hw[0] * hw[1], q.shape[-1]
        place = F.pad(torch.arange(n, device=q.device, dtype=wide), (num_prefix, 0))
        angles = place[:, None] * 10000 ** -torch.linspace(0, 1, dim // 2, device=q.device, dtype=wide)
        q, k = rotate(q, angles).to(v.dtype), rotate(k, angles).to(v.dtype)
        rows, columns = (torch.arange(side, device=q.device, dtype=wide) for side in hw)
        if not self.decomposed:
            distance = sum((s[:, None] - s).abs() for s in grid_places(rows, columns))  # (h w, h w)
            bias = self.log_decay(F.pad(distance, (num_prefix, 0, num_prefix, 0))).to(v.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias) + local
        q, k, v = (x.unflatten(2, hw).permute(2, 0, 1, 3, 4) for x in (q, k, v))  # (h, B, H, w, D): rows as batch
        dy, dx = ((s[:, None] - s).abs() for s in (rows, columns))
        v = F.scaled_dot_product_attention(q, k, v, attn_mask=self.log_decay(dx).to(v.dtype)[None])
        q, k, v = (x.permute(3, 1, 2, 0, 4) for x in (q, k, v))  # (w, B, H, h, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.log_decay(dy).to(v.dtype)[None])
        return out.permute(1, 2, 3, 0, 4).flatten(2, 3) + local
