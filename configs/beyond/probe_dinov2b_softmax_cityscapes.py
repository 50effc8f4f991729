# Baseline: a linear probe on Cityscapes at 512 x 512 on the frozen features of the original softmax DINOv2-B.
from mmengine.config import read_base

with read_base():
    from .probe_dinov2b_cityscapes import *

model['backbone'].update(attention=softmax, init_cfg=pretrained)
