from adala_mm.models.attentions.base import Attention, build_attention
from adala_mm.models.attentions.linear import LinearAttention
from adala_mm.models.attentions.softmax import SoftmaxAttention

__all__ = ['Attention', 'LinearAttention', 'SoftmaxAttention', 'build_attention']
