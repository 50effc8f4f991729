# Baseline: ImageNet-1K classification at 512 x 512 with the original softmax DINOv2-L, same schedule.
from mmengine.config import read_base

with read_base():
    from .cls_dinov2l_in1k import *

model['backbone'].update(attention=softmax, init_cfg=pretrained)
