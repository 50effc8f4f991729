# Table 3, stage 1 alone: Mask2Former on ADE20K.
from mmengine.config import read_base

with read_base():
    from .mask2former_dinov2l_ade20k import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_coco/epoch_4.pth'))
