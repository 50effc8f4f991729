from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.registry import ATTENTIONS


@ATTENTIONS.register_module()
class SoftmaxAttention(Attention):
    """``out_i = sum_j softmax_j(q_i·k_j / sqrt(D)) v_j`` (ViT-AdaLA eq. 1), by PyTorch's fused kernels; O(N^2 D)."""

    is_softmax = True
    formula = 'softmax(q kᵀ/√D) v'
    cost = '2N²D'
    reference = 'Vaswani et al., NeurIPS 2017'

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)
