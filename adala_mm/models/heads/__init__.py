from adala_mm.models.heads.mask2former import Mask2FormerHead, MSDeformAttnPixelDecoder

__all__ = ['MSDeformAttnPixelDecoder', 'Mask2FormerHead']
