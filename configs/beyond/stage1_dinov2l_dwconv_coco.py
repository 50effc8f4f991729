# Beyond the paper, stage 1: a depth-wise 3 x 3 convolution of the values in every attention.
from mmengine.config import read_base

with read_base():
    from ..adala.stage1_dinov2l_coco import *

model['backbone'].update(attention=dict(type='adala_mm.LinearAttention', dwconv=3))
