from __future__ import annotations

from torch import Tensor

from adala_mm.models.attentions.base import Attention
from adala_mm.ops import check_feature_map, linear_attention, linear_attention_packed
from adala_mm.registry import ATTENTIONS


@ATTENTIONS.register_module()
class LinearAttention(Attention):
    """Vanilla linear attention (ViT-AdaLA eq. 2), O(N D^2); see `adala_mm.ops.linear_attention`.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        feature_map: phi, one of ``elu1`` (the paper's choice), ``relu``, ``softplus``, ``softmax``, ``exp`` (A.3).
        eps: added to the denominator.

    Raises:
        ValueError: for an unknown ``feature_map``.
    """

    formula = 'φ(q)·Σφ(k)ᵀv / φ(q)·Σφ(k), φ = elu+1'
    cost = '2ND²'
    reference = 'Katharopoulos et al., ICML 2020'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, feature_map: str = 'elu1',
                 eps: float = 1e-6) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        check_feature_map(feature_map)
        self.feature_map = feature_map
        self.eps = eps

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        return linear_attention(q, k, v, self.feature_map, self.eps)

    def attend(self, x: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, D)
        return linear_attention_packed(qkv, self.feature_map, self.eps).flatten(2)

    def extra_repr(self) -> str:
        return f'feature_map={self.feature_map}'
