# A linear head on the frozen features of the recipe plus.
from mmengine.config import read_base

with read_base():
    from .probe_deitt_camvid import *
    from .._base_.plus import *

model['backbone'].update(attention=plus_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_deitt_plus_caltech/iter_1200.pth'))
