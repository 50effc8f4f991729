from adala_mm.models.algorithms.attention_alignment import AttentionAlignment
from adala_mm.models.algorithms.feature_alignment import FeatureAlignment

__all__ = ['AttentionAlignment', 'FeatureAlignment']
