from adala_mm.evaluation.alignment import AlignmentMetric

__all__ = ['AlignmentMetric']
