# The recipe coarse, stage 3: CLIP-L, a linear head on ImageNet-1K.
from mmengine.config import read_base

with read_base():
    from ..adala.cls_clipl_in1k import *
    from .._base_.coarse import *

model['backbone'].update(attention=coarse_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_clipl_coarse_in22k/epoch_15.pth'))
