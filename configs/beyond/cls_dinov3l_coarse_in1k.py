# The recipe coarse, stage 3: DINOv3-L, a linear head on ImageNet-1K.
from mmengine.config import read_base

with read_base():
    from ..adala.cls_dinov3l_in1k import *
    from .._base_.coarse import *

model['backbone'].update(attention=coarse_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov3l_coarse_in22k/epoch_30.pth'))
