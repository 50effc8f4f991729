from adala_mm.evaluation.alignment import AlignmentMetric
from adala_mm.evaluation.knn import KNNMetric

__all__ = ['AlignmentMetric', 'KNNMetric']
