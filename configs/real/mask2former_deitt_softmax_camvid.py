# Baseline on real photographs: the same Mask2Former and schedule with the original softmax DeiT-tiny.
from mmengine.config import read_base

with read_base():
    from .mask2former_deitt_camvid import *

model['backbone'].update(attention=dict(type='adala_mm.SoftmaxAttention'), init_cfg=pretrained)
