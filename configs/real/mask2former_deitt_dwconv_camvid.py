# Stage 3 after stages beyond the paper: a depth-wise 3 x 3 convolution of the values in every attention.
from mmengine.config import read_base

with read_base():
    from .mask2former_deitt_camvid import *

model['backbone'].update(attention=dict(type='adala_mm.LinearAttention', dwconv=3))
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_deitt_dwconv_caltech/iter_1200.pth'))
