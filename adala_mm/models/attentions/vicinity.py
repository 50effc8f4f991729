from __future__ import annotations

from math import pi

import torch
from torch import Tensor, nn

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.cosformer import cosine_weighted_sums
from adala_mm.models.attentions.parts import grid_places
from adala_mm.ops import Rotation, in_float32
from adala_mm.registry import ATTENTIONS

FORMS = ('sum', 'product')


@ATTENTIONS.register_module()
class VicinityAttention(Attention):
    """Linear attention that fades with distance on the grid (Sun et al. 2022, arXiv 2206.10552).

    ``out_i = sum_j w_ij v_j / (sum_j w_ij + eps)`` with ``w_ij = relu(q_i)·relu(k_j) g(a, b)``, where
    ``a = pi / 2 (y_i - y_j) / h``, ``b = pi / 2 (x_i - x_j) / w`` and g is ``cos a + cos b`` (``sum``) or
    ``cos a cos b`` (``product``). Each channel is scaled after the output projection: the layer gives
    ``proj(out) * (1 + sigmoid(W2 relu(W1 mean_n x)))``, x being its input; at first about 1.5 times. Any grid.
    Published models have no class token: ours, and registers, have no place and see all with cosines of 1. The
    published halving of q, k, v (a width that no pretrained ViT has) and its clamps for float16 are left out; in
    float32 throughout.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        form: ``sum`` or ``product``.
        se_reduction: C is divided by it between W1 and W2; None for no such scaling.
        eps: added to the denominator.

    Raises:
        ValueError: for an unknown ``form``, or a ``se_reduction`` that leaves no channel.
    """

    after_proj = ('se',)
    formula = 'proj(Σw v / Σw) ⊙ (1 + SE(x)), w = relu(q)·relu(k) (cos πΔy/2h + cos πΔx/2w)'
    cost = '8ND²'
    positional = True
    reference = 'Sun et al., TPAMI 2023'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, form: str = 'sum',
                 se_reduction: int | None = 1, eps: float = 1e-4) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if form not in FORMS:
            raise ValueError(f'unknown form {form!r}; choose one of {", ".join(FORMS)}')
        self.form = form
        self.eps = eps
        self.se = None
        if se_reduction is not None:
            if not 1 <= se_reduction <= dim:
                raise ValueError(f'se_reduction={se_reduction} does not lie between 1 and the width {dim}')
            self.se = nn.Sequential(nn.Linear(dim, dim // se_reduction, bias=False), nn.ReLU(),
                                    nn.Linear(dim // se_reduction, dim, bias=False), nn.Sigmoid())

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        y, x = (pi / 2 * torch.arange(side, device=q.device, dtype=torch.float64) / side for side in hw)
        a, b = grid_places(y, x)
        if self.form == 'sum':
            total, weight = cosine_weighted_sums(q, k, v, [a, b], num_prefix)
        else:  # cos a cos b = (cos(a + b) + cos(a - b)) / 2
            total, weight = (s / 2 for s in cosine_weighted_sums(q, k, v, [a + b, a - b], num_prefix))
        return total / (weight + self.eps)

    def forward(self, x: Tensor, hw: tuple[int, int], num_prefix: int, rotation: Rotation | None = None) -> Tensor:
        out = super().forward(x, hw, num_prefix, rotation)
        return out if self.se is None else out * (1 + self.se(x.mean(dim=1, keepdim=True)))
