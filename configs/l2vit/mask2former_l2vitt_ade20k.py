# Mask2Former on ADE20K at 512 x 512 with the L2ViT-T of cls_l2vitt_in1k, on the schedule of configs/adala.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.l2vitt import *
    from .._base_.datasets.ade20k import *
    from .._base_.models.mask2former import *
    from .._base_.schedules.stage3_mask2former import *

backbone.update(drop_path_rate=0.3)
backbone.update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/cls_l2vitt_in1k/epoch_300.pth'))
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model.pop('neck')  # the stages have strides 4, 8, 16 and 32 by themselves
model['data_preprocessor'].update(size=crop_size, **preprocessor)
model['decode_head'].update(in_channels=widths, num_classes=num_classes)
model['decode_head']['loss_cls'].update(class_weight=[1.0] * num_classes + [0.1])
