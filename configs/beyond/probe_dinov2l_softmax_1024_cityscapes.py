# Baseline: a linear probe on Cityscapes at 1024 x 1024 on the frozen features of the original softmax DINOv2-L.
from mmengine.config import read_base

with read_base():
    from .probe_dinov2l_1024_cityscapes import *

model['backbone'].update(attention=softmax, init_cfg=pretrained)
