# A linear head on the frozen features of the best recipe that we know, with two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from .linear_deitt_camvid import *
    from .._base_.plus import *
    from .._base_.retained.deitt import *

model['backbone'].update(
    attention=[dict(type='adala_mm.SoftmaxAttention') if i in retained_plus else plus_attention for i in range(12)])
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_deitt_plus_retain2_caltech/iter_1200.pth'))
