# Stage 3 after stages beyond the paper: the head reads the four blocks that stage 2 compared.
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_dinov2l_ade20k import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_multilayer_in22k/epoch_30.pth'))
model['backbone'].update(out_indices=[5, 11, 17, 23])
