# Stage 3: ImageNet-1K classification at 512 x 512 with the aligned linear DINOv2-L and a linear head.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.dinov2l import *
    from .._base_.datasets.in1k_512 import *
    from .._base_.models.classifier import *
    from .._base_.schedules.stage3_cls import *

backbone.update(out_type='cls_token')
backbone.update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_in22k/epoch_30.pth'))
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(preprocessor)
default_hooks.update(visualization=visualization_hook)
