# Beyond the paper, stage 1: the last four blocks kept softmax, for the queries of an encoder-only mask head.
from mmengine.config import read_base

with read_base():
    from ..adala.stage1_dinov2l_coco import *
    from .._base_.retained.dinov2l_last4 import *

model['backbone'].update(attention=last4)
