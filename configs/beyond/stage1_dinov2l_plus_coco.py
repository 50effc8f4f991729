# The recipe plus, stage 1: learnt exponential feature maps, convolved values.
from mmengine.config import read_base

with read_base():
    from ..adala.stage1_dinov2l_coco import *
    from .._base_.plus import *

model['backbone'].update(attention=plus_attention)
