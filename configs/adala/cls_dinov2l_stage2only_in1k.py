# Tables 1 and 10, stage 2 alone: ImageNet-1K classification at 512 x 512.
from mmengine.config import read_base

with read_base():
    from .cls_dinov2l_in1k import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_nostage1_in22k/epoch_30.pth'))
