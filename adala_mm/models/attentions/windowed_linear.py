from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.heads import centred
from adala_mm.models.attentions.hedgehog import HedgehogMap
from adala_mm.models.attentions.parts import DepthwiseConv
from adala_mm.models.attentions.tiles import fit_tile, from_tiles, padded, real_patches, to_tiles
from adala_mm.ops import in_float32
from adala_mm.registry import ATTENTIONS


def sums_elsewhere(log_k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_j exp(log_k_j)^T v_j`` over the keys of all tiles but one, for each tile, as ``exp(shift) sums``.

    What a tile contributes is subtracted from the whole only where another tile has the greatest key of a feature,
    which is 1 after the shift, so that digits of the rest are not lost; for the tile that has it the others are summed.

    Args:
        log_k: (B, H, T, b, F).
        v: (B, H, T, b, D).

    Returns:
        sums (B, H, T, F, D) and shift (B, H, T, F), the greatest log_k of the other tiles; no gradient is needed there.
    """
    peak = log_k.detach().amax(dim=3)  # (B, H, T, F)
    first, holder = peak.max(dim=2, keepdim=True)
    holds = torch.arange(peak.shape[2], device=peak.device)[:, None] == holder  # (B, H, T, F)
    second = peak.masked_fill(holds, torch.finfo(peak.dtype).min).amax(dim=2, keepdim=True)
    own = (log_k - first.unsqueeze(3)).exp_().mT @ v  # (B, H, T, F, D)
    others = (log_k - second.unsqueeze(3)).masked_fill_(holds.unsqueeze(3), -torch.inf).exp_()
    others = (others.flatten(2, 3).mT @ v.flatten(2, 3)).unsqueeze(2)  # (B, H, 1, F, D)
    rest = own.sum(dim=2, keepdim=True) - own
    place = holder.unsqueeze(-1).expand_as(others)
    return rest.scatter_(2, place, others), torch.where(holds, second, first)


@ATTENTIONS.register_module()
class WindowedLinearAttention(Attention):
    """Softmax's own weights near, a learnt kernel's far, and one normaliser for both.

    ``out_i = sum_j w_ij v_j / sum_j w_ij``. With keys less their mean over the image, which softmax does not notice,
    ``w_ij = exp(q_i·k_j / sqrt D)`` if j is in the s x s window of i or a class or register token, and elsewhere

    ``w_ij = phi(q_i)·phi(k_j) = exp(-(|a|^2 + |b|^2) / 2 F) mean_f cosh(a_f + b_f)``, ``a = W_q q_i``, ``b = W_k k_j``,

    matrices per head that start as the identity (`HedgehogMap`). To second order that is ``exp(a·b / F)``: flatter than
    softmax's weights, and of their size, so that neither part drowns the other before training. Queries of class and
    register tokens take the softmax over all keys. Windows do not overlap, and are smaller at the grid's right and
    bottom edge if s does not divide it. O(N). Both parts are shifted by the greater exponent of a query, and no sum
    loses digits to a difference (`sums_elsewhere`). In float32 throughout. LoLCATs has both kinds of weights in text,
    its exact window behind a learnt factor.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        window_size: s; a window as large as the grid gives softmax attention.
        feature_dim: F, half of D if None; there are 2 F features.
        dwconv: side of a convolution of the values that is added, as in `LinearAttention`; None for none.

    Raises:
        ValueError: for a ``window_size`` or ``feature_dim`` below 1, or a ``dwconv`` that is even or not positive.
    """

    formula = 'Σw v / Σw, w = exp(qkᵀ/√D) within windows of S × S, else φ(q)·φ(k), φ(x) = exp(±Wx − |Wx|²/2F), W learnt'
    cost = '2NS²D + 8NDF'
    positional = True
    reference = 'after Zhang et al., ICLR 2025'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, window_size: int = 7,
                 feature_dim: int | None = None, dwconv: int | None = None) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if window_size < 1:
            raise ValueError(f'window_size={window_size}: a window needs at least one patch')
        feature_dim = (dim // num_heads + 1) // 2 if feature_dim is None else feature_dim
        if feature_dim < 1:
            raise ValueError(f'feature_dim={feature_dim}: at least one feature is needed')
        self.window_size = window_size
        self.feature_map = HedgehogMap(num_heads, dim // num_heads, feature_dim)
        self.dwconv = None if dwconv is None else DepthwiseConv(dim, dwconv)

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        tile = fit_tile((self.window_size, self.window_size), hw)
        first = F.scaled_dot_product_attention(q[:, :, :num_prefix], k, v)
        (_, prefix_k, prefix_v), patches = zip(*(x.tensor_split((num_prefix,), dim=2) for x in (q, centred(k), v)),
                                               strict=True)
        q, k, windows = (to_tiles(x, hw, tile) for x in patches)  # (B, H, T, b, D)
        real, least = real_patches(hw, tile, q.device), torch.finfo(q.dtype).min
        log_q, log_k = (y.unflatten(2, (-1, q.shape[3])) for y in self.feature_map(q.flatten(2, 3), k.flatten(2, 3)))
        lengths = [y.square().mean(dim=-1, keepdim=True) / 2 for y in (log_q, log_k)]
        log_k = torch.cat([log_k, -log_k], dim=-1) - lengths[1]
        if padded(hw, tile):
            log_k = log_k.masked_fill(~real.unsqueeze(-1), least)
        sums, shift = sums_elsewhere(log_k, F.pad(windows, (0, 1), value=1))  # the sum of weights: of values 1
        log_q = torch.cat([log_q, -log_q], dim=-1) + shift.unsqueeze(3) - (lengths[0] + math.log(2 * log_q.shape[-1]))

        keys, values = (torch.cat([x.unsqueeze(2).expand(-1, -1, q.shape[2], -1, -1), y], dim=3)
                        for x, y in ((prefix_k, k), (prefix_v, windows)))
        scores = q * q.shape[-1] ** -0.5 @ keys.mT  # (B, H, T, b, P + b)
        if padded(hw, tile):
            scores = scores.masked_fill(~F.pad(real, (num_prefix, 0), value=True).unsqueeze(1), least)
        peak = torch.maximum(*(x.detach().amax(dim=-1, keepdim=True) for x in (scores, log_q)))
        near, far = (scores - peak).exp_(), (log_q - peak).exp_()
        total = far @ sums
        out = (near @ values + total[..., :-1]) / (near.sum(dim=-1, keepdim=True) + total[..., -1:])
        out = torch.cat([first, from_tiles(out, hw, tile)], dim=2)
        return out if self.dwconv is None else out + self.dwconv(v, hw, num_prefix)
