# Beyond the paper, stage 2: two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *
    from .._base_.retained.dinov2l import *

model['backbone'].update(attention=retained_softmax)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_retain2_coco/epoch_4.pth'))
