from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.heads import merge_heads, split_heads
from adala_mm.models.attentions.parts import DepthwiseConv
from adala_mm.ops import Rotation, gated_linear_attention, in_float32
from adala_mm.registry import ATTENTIONS

SHARPNESS = 16  # published: a gate forgets a sixteenth of what its sigmoid says


class ForgetGate(nn.Sequential):
    """``g = logsigmoid(W2 W1 x + b) / 16`` through 16 channels."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 16, bias=False), nn.Linear(16, dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(super().forward(x)) / SHARPNESS


class HeadNorm(nn.RMSNorm):
    """``x / sqrt(mean_d x^2 + 1e-5) * w`` over the channels of a head, in float32."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, eps=1e-5)

    @in_float32
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


@ATTENTIONS.register_module()
class ViGAttention(Attention):
    """Bidirectional gated linear attention of ViG (Liao et al. 2024, arXiv 2405.18425).

    Two passes over the tokens, row by row, with shared q, k, v and gates g of their own:
    ``S_t = diag(exp g_t) S_{t-1} + k_t^T v_t``, ``f_t = q_t S_t / sqrt D`` forward, b_t backward (both count the token
    itself). ``o = (f + b) / 2`` meets ``local = silu(dwconv3x3(x))``:

    ``out = proj(s * rms(o) + (1 - s) * rms(local))``, ``s = sigmoid(W x + c)``,

    rms being RMSNorm over the channels of a head. Any grid; class and register tokens come first and skip convolution
    and silu. The convolution starts as the identity, s at 1/2. Published models take q, k, v and all gates from
    ``local``, with half as many key channels (``conv_input=True`` does the first); pretrained projections expect x, so
    by default they get it.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        conv_input: project ``local`` instead of x.
    """

    formula = 's rms((f + b)/2) + (1−s) rms(silu(dwconv x)), f and b: S = diag(eᵍ)S + kᵀv, qS/√D both ways'
    cost = '4ND² + 32ND'
    positional = True
    reference = 'Liao et al., AAAI 2025'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, conv_input: bool = False) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        self.conv_input = conv_input
        self.local = DepthwiseConv(dim, 3)
        with torch.no_grad():
            self.local.weight[:, 0, 1, 1] = 1
        self.forget = nn.ModuleList(ForgetGate(dim) for _ in range(2))
        self.swap = nn.Linear(dim, dim)
        nn.init.zeros_(self.swap.weight)
        nn.init.zeros_(self.swap.bias)
        self.norms = nn.ModuleList(HeadNorm(dim // num_heads) for _ in range(2))

    def attend(self, x: Tensor, hw: tuple[int, int], num_prefix: int, rotation: Rotation | None = None) -> Tensor:
        heads = split_heads(x, self.num_heads)
        patches = F.silu(self.local(heads, hw, num_prefix))
        local = torch.cat([heads[:, :, :num_prefix], patches[:, :, num_prefix:]], dim=2)
        source = merge_heads(local) if self.conv_input else x
        q, k, v = self.turned(source, hw, num_prefix, rotation)
        q = q * q.shape[-1] ** -0.5
        forward, backward = (split_heads(gate(source), self.num_heads) for gate in self.forget)
        out = gated_linear_attention(q, k, forward, v)
        out = out + gated_linear_attention(q.flip(2), k.flip(2), backward.flip(2), v.flip(2)).flip(2)
        global_norm, local_norm = self.norms
        share = self.swap(source).sigmoid()
        return share * merge_heads(global_norm(out / 2)) + (1 - share) * merge_heads(local_norm(local))
