# The recipe coarse, stage 3: DINOv3-B, Mask2Former on ADE20K.
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_dinov3b_ade20k import *
    from .._base_.coarse import *

model['backbone'].update(attention=coarse_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov3b_coarse_in22k/epoch_30.pth'))
