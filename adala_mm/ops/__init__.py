"""Tensor functions. Nothing here imports anything but torch."""
from adala_mm.ops.deformable_attention import ms_deform_attn
from adala_mm.ops.linear_attention import FEATURE_MAPS, linear_attention

__all__ = ['FEATURE_MAPS', 'linear_attention', 'ms_deform_attn']
