# Baseline: an encoder-only mask head on Cityscapes at 1024 x 1024 with the original softmax DINOv2-L, same schedule.
from mmengine.config import read_base

with read_base():
    from .eomt_dinov2l_1024_cityscapes import *

model['backbone'].update(attention=softmax, init_cfg=pretrained)
