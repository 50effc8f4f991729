from adala_mm.models.algorithms.attention_alignment import AttentionAlignment
from adala_mm.models.algorithms.feature_alignment import FeatureAlignment
from adala_mm.models.algorithms.task_model_alignment import TaskModelAlignment

__all__ = ['AttentionAlignment', 'FeatureAlignment', 'TaskModelAlignment']
