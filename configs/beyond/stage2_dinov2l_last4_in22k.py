# Beyond the paper, stage 2: the last four blocks kept softmax, for the queries of an encoder-only mask head.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *
    from .._base_.retained.dinov2l_last4 import *

model['backbone'].update(attention=last4)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_last4_coco/epoch_4.pth'))
