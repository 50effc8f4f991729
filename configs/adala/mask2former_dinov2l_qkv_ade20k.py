# Table 9 (A.7), stage 2 tuned query, key and value projections only: Mask2Former on ADE20K.
from mmengine.config import read_base

with read_base():
    from .mask2former_dinov2l_ade20k import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_qkv_in22k/epoch_30.pth'))
