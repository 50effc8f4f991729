# Beyond the paper, stage 2: two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from .stage2_deitt_caltech import *
    from .._base_.retained.deitt import *

model['backbone'].update(attention=retained_softmax)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_deitt_retain2_caltech/iter_200.pth'))
