# Detection and instance masks: ViTDet's Mask R-CNN on COCO at 1024 x 1024 with the aligned linear DINOv2-L.
from mmengine.config import read_base

with read_base():
    from .._base_.detection_runtime import *
    from .._base_.backbones.dinov2l import *
    from .._base_.datasets.coco_instances_1024 import *
    from .._base_.models.mask_rcnn import *
    from .._base_.schedules.vitdet_100e import *

backbone.update(img_size=1024, drop_path_rate=0.4)
backbone.update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_in22k/epoch_30.pth'))
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(preprocessor)
model['roi_head']['bbox_head'].update(num_classes=num_classes)
model['roi_head']['mask_head'].update(num_classes=num_classes)
