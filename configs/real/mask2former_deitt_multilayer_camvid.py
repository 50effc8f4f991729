# Stage 3 after stages beyond the paper: the head reads the four blocks that stage 2 compared.
from mmengine.config import read_base

with read_base():
    from .mask2former_deitt_camvid import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_deitt_multilayer_caltech/iter_1200.pth'))
model['backbone'].update(out_indices=[2, 5, 8, 11])
