# Tables 4 and 11, stage 2 alone: Mask2Former on Cityscapes at 512 x 512.
from mmengine.config import read_base

with read_base():
    from .mask2former_dinov2l_cityscapes import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_nostage1_in22k/epoch_30.pth'))
