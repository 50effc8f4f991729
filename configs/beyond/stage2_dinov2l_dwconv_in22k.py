# Beyond the paper, stage 2: a depth-wise 3 x 3 convolution of the values in every attention.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *

model['backbone'].update(attention=dict(type='adala_mm.LinearAttention', dwconv=3))
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_dwconv_coco/epoch_4.pth'))
