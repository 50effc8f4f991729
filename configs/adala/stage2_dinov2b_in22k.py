# Stage 2: feature alignment of DINOv2-B on ImageNet-22K at 512 x 512, 30 epochs.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.dinov2b import *
    from .._base_.datasets.in22k_images import *
    from .._base_.schedules.stage2 import *

model = dict(
    type='adala_mm.FeatureAlignment',
    teacher=dict(backbone, attention=softmax),
    backbone=dict(backbone, init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2b_coco/epoch_4.pth')),
    loss_scale=5.0,
    data_preprocessor=dict(type='ImgDataPreprocessor', bgr_to_rgb=True, **preprocessor))
del backbone  # from here on it is model['backbone']
