# Table 9 (A.7), stage 2 tuned query, key and value projections only: ImageNet-1K classification.
from mmengine.config import read_base

with read_base():
    from .cls_dinov2l_in1k import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_qkv_in22k/epoch_30.pth'))
