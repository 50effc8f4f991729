from __future__ import annotations

from torch import Tensor

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.heads import centred, merge_heads
from adala_mm.models.attentions.parts import DepthwiseConv
from adala_mm.ops import Rotation, check_feature_map, linear_attention, linear_attention_packed
from adala_mm.registry import ATTENTIONS


@ATTENTIONS.register_module()
class LinearAttention(Attention):
    """Vanilla linear attention (ViT-AdaLA eq. 2), O(N D^2); see `adala_mm.ops.linear_attention`.

    With ``dwconv``, beyond the paper: ``out = linear_attention(q, k, v) + conv(v)``, a depth-wise convolution of the
    values over the patch grid, ``dwconv^2 C`` multiply-adds a patch. What linear attention cannot do, telling a token's
    neighbours from the rest, it adds where it is cheapest. It starts at zero, so that the layer is the plain one at
    first. Class and register tokens get nothing from it.

    phi acts on channels one by one, so that of rotary positions it keeps more than the difference of two places:
    ``phi(R_i q)·phi(R_j k)`` depends on both (see `adala_mm.ops.RotaryPositions`).

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        feature_map: phi, one of ``elu1`` (the paper's choice), ``relu``, ``softplus``, ``softmax`` over the channels,
            ``exp`` (A.3); or ``efficient``, softmax over the channels of a query and over the tokens for each channel
            of the keys: Efficient Attention (Shen et al. 2021, arXiv 1812.01243), whose weights sum to 1 undivided.
        eps: added to the denominator.
        dwconv: side of the kernel, odd; None for no convolution.
        center_keys: whether phi sees the keys less their mean over the image (`centred`).

    Raises:
        ValueError: for an unknown ``feature_map``, or a ``dwconv`` that is even or not positive.
    """

    formula = 'φ(q)·Σφ(k)ᵀv / φ(q)·Σφ(k), φ = elu+1'
    cost = '2ND²'
    reference = 'Katharopoulos et al., ICML 2020'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, feature_map: str = 'elu1',
                 eps: float = 1e-6, dwconv: int | None = None, center_keys: bool = False) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        check_feature_map(feature_map)
        self.feature_map = feature_map
        self.eps = eps
        self.center_keys = center_keys
        self.dwconv = None if dwconv is None else DepthwiseConv(dim, dwconv)
        self.positional = self.dwconv is not None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        out = linear_attention(q, centred(k) if self.center_keys else k, v, self.feature_map, self.eps)
        return out if self.dwconv is None else out + self.dwconv(v, hw, num_prefix)

    def attend(self, x: Tensor, hw: tuple[int, int], num_prefix: int, rotation: Rotation | None = None) -> Tensor:
        if self.center_keys or rotation is not None:
            return super().attend(x, hw, num_prefix, rotation)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, D)
        out = linear_attention_packed(qkv, self.feature_map, self.eps).flatten(2)
        if self.dwconv is None:
            return out
        return out + merge_heads(self.dwconv(qkv[:, :, 2].transpose(1, 2), hw, num_prefix))

    def extra_repr(self) -> str:
        return f'feature_map={self.feature_map}'
