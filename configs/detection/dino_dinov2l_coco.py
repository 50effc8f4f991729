# Detection: DINO on COCO with the aligned linear DINOv2-L.
from mmengine.config import read_base

with read_base():
    from .._base_.detection_runtime import *
    from .._base_.backbones.dinov2l import *
    from .._base_.datasets.coco_detection import *
    from .._base_.models.dino import *
    from .._base_.schedules.dino_12e import *

backbone.update(img_size=1024)
backbone.update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_in22k/epoch_30.pth'))
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(preprocessor)
model['bbox_head'].update(num_classes=num_classes)
