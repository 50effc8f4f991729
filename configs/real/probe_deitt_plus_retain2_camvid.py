# A linear head on the frozen features of the recipe plus, with two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from .probe_deitt_camvid import *
    from .._base_.retained.deitt_plus import *

model['backbone'].update(attention=retained_softmax)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_deitt_plus_retain2_caltech/iter_1200.pth'))
