# Baseline: Mask2Former on Cityscapes at 1024 x 1024 with the original softmax DINOv3-L, same schedule.
from mmengine.config import read_base

with read_base():
    from .mask2former_dinov3l_1024_cityscapes import *

model['backbone'].update(attention=softmax, init_cfg=pretrained)
