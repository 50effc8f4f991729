# Stage 3 after stages beyond the paper: two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from .mask2former_deitt_camvid import *
    from .._base_.retained.deitt import *

model['backbone'].update(attention=retained_softmax)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_deitt_retain2_caltech/iter_1200.pth'))
