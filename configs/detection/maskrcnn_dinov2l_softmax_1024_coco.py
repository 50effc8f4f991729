# Baseline: ViTDet's Mask R-CNN on COCO at 1024 x 1024 with the original softmax DINOv2-L, same schedule.
from mmengine.config import read_base

with read_base():
    from .maskrcnn_dinov2l_1024_coco import *

model['backbone'].update(attention=softmax, init_cfg=pretrained)
