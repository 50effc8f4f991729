from adala_mm.models.necks.attention_pool import AttentionPool
from adala_mm.models.necks.simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ['AttentionPool', 'SimpleFeaturePyramid']
