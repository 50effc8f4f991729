# Baseline: Mask2Former on Cityscapes at 512 x 512 with the original softmax DINOv3-B, same schedule.
from mmengine.config import read_base

with read_base():
    from .mask2former_dinov3b_cityscapes import *

model['backbone'].update(attention=softmax, init_cfg=pretrained)
