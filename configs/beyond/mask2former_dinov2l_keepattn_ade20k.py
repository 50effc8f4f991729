# Stage 3 after stages beyond the paper: the loss of stage 1 is kept on.
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_dinov2l_ade20k import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_keepattn_in22k/epoch_30.pth'))
