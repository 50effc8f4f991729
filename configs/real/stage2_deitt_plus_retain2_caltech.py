# The recipe plus, stage 2, with two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from .stage2_deitt_plus_caltech import *
    from .._base_.retained.deitt_plus import *

model['backbone'].update(attention=retained_softmax)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_deitt_plus_retain2_caltech/iter_200.pth'))
