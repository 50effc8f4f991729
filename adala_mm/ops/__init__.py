"""Tensor functions. Nothing here imports anything but torch, and Triton where there is a GPU."""
from adala_mm.ops.deformable_attention import ms_deform_attn
from adala_mm.ops.exporting import exporting, same_grid
from adala_mm.ops.gated_linear_attention import gated_linear_attention
from adala_mm.ops.linear_attention import linear_attention, linear_attention_packed
from adala_mm.ops.plain_linear_attention import (
                                                 FEATURE_MAPS,
                                                 check_feature_map,
                                                 elu1,
                                                 linear_attention_reference,
                                                 shifted_exp,
                                                 weighted_sums,
)
from adala_mm.ops.precision import in_float32
from adala_mm.ops.rotary import RotaryPositions, Rotation, turn

__all__ = ['FEATURE_MAPS', 'RotaryPositions', 'Rotation', 'check_feature_map', 'elu1', 'exporting',
           'gated_linear_attention', 'in_float32', 'linear_attention', 'linear_attention_packed',
           'linear_attention_reference', 'ms_deform_attn', 'same_grid', 'shifted_exp', 'turn', 'weighted_sums']
