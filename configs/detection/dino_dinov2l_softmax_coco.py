# Baseline: DINO on COCO with the original softmax DINOv2-L, same schedule.
from mmengine.config import read_base

with read_base():
    from .dino_dinov2l_coco import *

model['backbone'].update(attention=softmax, init_cfg=pretrained)
