# Stage 3 after stages beyond the paper: two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_dinov2l_ade20k import *
    from .._base_.retained.dinov2l import *

model['backbone'].update(attention=retained_softmax)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_retain2_in22k/epoch_30.pth'))
