import adala_mm.openmmlab  # noqa: F401  without compiled ops, mmdet cannot be imported unaided
from adala_mm.utils.stack import import_quietly

import_quietly('mmdet.models', 'mmseg.models')

from adala_mm.models.heads.encoder_mask import EncoderMaskHead  # noqa: E402
from adala_mm.models.heads.mask2former import Mask2FormerHead, MSDeformAttnPixelDecoder  # noqa: E402

__all__ = ['EncoderMaskHead', 'MSDeformAttnPixelDecoder', 'Mask2FormerHead']
