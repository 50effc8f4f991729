# Stage 1: attention alignment of SigLIP 2-L on COCO images at 512 x 512.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.siglip2l import *
    from .._base_.datasets.coco_images import *
    from .._base_.schedules.stage1 import *

model = dict(
    type='adala_mm.AttentionAlignment',
    backbone=backbone,
    data_preprocessor=dict(type='ImgDataPreprocessor', bgr_to_rgb=True, **preprocessor))
del backbone  # from here on it is model['backbone']
