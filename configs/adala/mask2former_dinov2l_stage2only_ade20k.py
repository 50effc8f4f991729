# Tables 2, 3 and 12, stage 2 alone: Mask2Former on ADE20K.
from mmengine.config import read_base

with read_base():
    from .mask2former_dinov2l_ade20k import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_nostage1_in22k/epoch_30.pth'))
