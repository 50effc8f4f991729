# Stage 3 after stages beyond the paper: a depth-wise 3 x 3 convolution of the values in every attention.
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_dinov2l_ade20k import *

model['backbone'].update(attention=dict(type='adala_mm.LinearAttention', dwconv=3))
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_dwconv_in22k/epoch_30.pth'))
