# Mask R-CNN on COCO, 12 epochs, with the L2ViT-T of cls_l2vitt_in1k. Drop path is the authors': 0.1 for T and S, 0.2
# for B.
from mmengine.config import read_base

with read_base():
    from .._base_.detection_runtime import *
    from .._base_.backbones.l2vitt import *
    from .._base_.datasets.coco_instances import *
    from .._base_.models.mask_rcnn_fpn import *
    from .._base_.schedules.mask_rcnn_1x import *

backbone.update(drop_path_rate=0.1)
backbone.update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/cls_l2vitt_in1k/epoch_300.pth'))
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(preprocessor)
model['neck'].update(in_channels=widths)
model['roi_head']['bbox_head'].update(num_classes=num_classes)
model['roi_head']['mask_head'].update(num_classes=num_classes)
