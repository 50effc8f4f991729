# Beyond the paper, stage 1: two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from ..adala.stage1_dinov2l_coco import *
    from .._base_.retained.dinov2l import *

model['backbone'].update(attention=retained_softmax)
