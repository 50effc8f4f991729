# Stage 3: Mask2Former on Cityscapes at 1024 x 1024 with the aligned linear DINOv3-B.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.dinov3b import *
    from .._base_.datasets.cityscapes_1024 import *
    from .._base_.models.mask2former import *
    from .._base_.schedules.stage3_mask2former import *

backbone.update(out_indices=[11] * 4)
backbone.update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov3b_in22k/epoch_30.pth'))
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(size=crop_size, **preprocessor)
model['decode_head'].update(num_classes=num_classes)
model['decode_head']['loss_cls'].update(class_weight=[1.0] * num_classes + [0.1])
model['neck'].update(embed_dim=768)
model['decode_head'].update(in_channels=[768] * 4)
