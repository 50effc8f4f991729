"""Tensor functions. Nothing here imports anything but torch."""
from adala_mm.ops.deformable_attention import ms_deform_attn
from adala_mm.ops.gated_linear_attention import gated_linear_attention
from adala_mm.ops.linear_attention import FEATURE_MAPS, elu1, linear_attention, shifted_exp, weighted_sums
from adala_mm.ops.precision import in_float32

__all__ = ['FEATURE_MAPS', 'elu1', 'gated_linear_attention', 'in_float32', 'linear_attention', 'ms_deform_attn',
           'shifted_exp', 'weighted_sums']
