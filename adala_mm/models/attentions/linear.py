from __future__ import annotations

from torch import Tensor

from adala_mm.models.attentions.base import Attention
from adala_mm.ops import FEATURE_MAPS, linear_attention
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
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f'unknown feature_map {feature_map!r}; choose one of {", ".join(FEATURE_MAPS)}')
        self.feature_map = feature_map
        self.eps = eps

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        return linear_attention(q, k, v, self.feature_map, self.eps)

    def extra_repr(self) -> str:
        return f'feature_map={self.feature_map}'
