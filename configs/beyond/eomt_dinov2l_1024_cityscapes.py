# Beyond the paper, stage 3: an encoder-only mask head on Cityscapes at 1024 x 1024 with the aligned linear DINOv2-L,
# whose last four blocks the queries join. The schedule is Mask2Former's, to compare with.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.dinov2l import *
    from .._base_.datasets.cityscapes_1024 import *
    from .._base_.models.encoder_mask import *
    from .._base_.schedules.stage3_mask2former import *

backbone.update(queries)
backbone.update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_in22k/epoch_30.pth'))
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(size=crop_size, **preprocessor)
model['decode_head'].update(num_classes=num_classes)
model['decode_head']['loss_cls'].update(class_weight=[1.0] * num_classes + [0.1])
