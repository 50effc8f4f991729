from __future__ import annotations

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.tiles import from_tiles, padded, real_patches, to_tiles
from adala_mm.ops import Rotation, in_float32, weighted_sums
from adala_mm.registry import ATTENTIONS


class LocalConcentration(nn.Module):
    """``conv2(norm(gelu(conv1(x))))`` on the patch grid, both depth-wise 7 x 7; zero for class and register tokens.

    ``norm`` is ``bn``, as published, or ``ln``, LayerNorm over channels, for small batches; else a ValueError.
    """

    def __init__(self, dim: int, norm: str = 'bn') -> None:
        super().__init__()
        if norm not in ('bn', 'ln'):
            raise ValueError(f'unknown norm {norm!r}; choose one of bn, ln')
        self.conv1 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.BatchNorm2d(dim) if norm == 'bn' else LayerNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)

    def forward(self, x: Tensor, hw: tuple[int, int], num_prefix: int = 0) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        grid = x[:, num_prefix:].transpose(1, 2).unflatten(2, hw)  # (B, C, h, w)
        out = self.conv2(self.norm(F.gelu(self.conv1(grid))))
        return F.pad(out.flatten(2).transpose(1, 2), (0, 0, num_prefix, 0))


@ATTENTIONS.register_module()
class L2ViTAttention(Attention):
    """Linear attention with a learnt scale and a floor under its denominator (Zheng 2025, arXiv 2501.16182).

    ``out_i = tau_h relu(q_i) [sum_j relu(k_j)^T v_j] / max(relu(q_i) · sum_j relu(k_j), floor)``

    tau starts at D^-1/2. A query below the floor is attenuated: v = 1 gives ``tau min(1, denominator / floor)``. How
    many are depends on q, k and their number. Position-free, prefix tokens are tokens like others; float32 throughout.

    Published blocks add `LocalConcentration` (LCM) as a residual of its own. Here ``local_concentration`` turns the
    projected output y into ``y + LCM(LayerNorm(y))`` on patches: our way into a plain ViT, with LayerNorm in the LCM
    too, and a last convolution that starts at zero, so that a pretrained ViT meets the attention alone at first.

    Raises:
        ValueError: for a ``denom_floor`` that is not positive.
    """

    after_proj = ('local',)
    formula = 'τ relu(q)·Σrelu(k)ᵀv / max(relu(q)·Σrelu(k), 100), τ learnt'
    cost = '2ND²'
    reference = 'Zheng 2025'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, denom_floor: float = 100.0,
                 local_concentration: bool = False) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if denom_floor <= 0:
            raise ValueError(f'denom_floor={denom_floor} must be positive: some queries have the denominator 0')
        self.denom_floor = denom_floor
        self.tau = nn.ParameterDict(dict(scale=torch.full((num_heads, 1, 1), (dim // num_heads) ** -0.5)))
        if local_concentration:
            self.local = nn.ModuleDict(dict(norm=nn.LayerNorm(dim), lcm=LocalConcentration(dim, norm='ln')))
            nn.init.zeros_(self.local['lcm'].conv2.weight)
            nn.init.zeros_(self.local['lcm'].conv2.bias)

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        total, weight = weighted_sums(F.relu(q), F.relu(k), v)
        return self.tau['scale'].to(q.dtype) * total / weight.clamp_min(self.denom_floor)

    def forward(self, x: Tensor, hw: tuple[int, int], num_prefix: int, rotation: Rotation | None = None) -> Tensor:
        out = super().forward(x, hw, num_prefix, rotation)
        return out + self.local['lcm'](self.local['norm'](out), hw, num_prefix) if hasattr(self, 'local') else out


@ATTENTIONS.register_module()
class WindowAttention(Attention):
    """Softmax attention inside s x s windows of the patch grid, which neither shift nor overlap: L2ViT's local half.

    A grid that s does not divide is padded at the right and bottom, invisibly with ``mask_padding``. Without, as
    published, zeros go through the projection and take part with its biases as key and value. Published models have no
    class and register tokens: ours attend to all real tokens, and patches to their window and to them. Rotary positions
    do not turn padding.

    Raises:
        ValueError: for a ``window_size`` below 1.
    """

    formula = 'softmax(qkᵀ/√D)v within windows of s × s patches'
    cost = '2NS²D'
    positional = True
    reference = 'Zheng 2025'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, window_size: int = 7,
                 mask_padding: bool = True) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if window_size < 1:
            raise ValueError(f'window_size={window_size}: a window needs at least one patch')
        self.window_size, self.mask_padding = window_size, mask_padding

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        window, heads = (self.window_size, self.window_size), q.shape[1]
        prefix, patches = zip(*(x.tensor_split((num_prefix,), dim=2) for x in (q, k, v)), strict=True)
        q_windows, *windows = (to_tiles(x, hw, window) for x in patches)  # (B, H, W, s s, D)
        real, mask = real_patches(hw, window, q.device), None  # (W, s s)
        if padded(hw, window) and self.mask_padding:
            mask = F.pad(real, (num_prefix, 0), value=True)[:, None].repeat(heads, 1, 1)[None]  # (1, H W, 1, P + s s)
        elif padded(hw, window):
            _, *zeros = self.project(q.new_zeros(1, 1, self.proj.in_features))
            windows = [torch.where(real[..., None], x, zero.unsqueeze(2)) for x, zero in
                       zip(windows, zeros, strict=True)]
        keys, values = (torch.cat([x.unsqueeze(2).expand(-1, -1, y.shape[2], -1, -1), y], dim=3).flatten(1, 2)
                        for x, y in zip(prefix[1:], windows, strict=True))
        out = F.scaled_dot_product_attention(q_windows.flatten(1, 2), keys, values, attn_mask=mask)
        out = from_tiles(out.unflatten(1, (heads, -1)), hw, window)
        return torch.cat([F.scaled_dot_product_attention(prefix[0], k, v), out], dim=2) if num_prefix else out
