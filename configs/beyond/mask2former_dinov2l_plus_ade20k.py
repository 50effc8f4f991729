# The recipe plus, stage 3: learnt exponential feature maps, convolved values, all layers compared.
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_dinov2l_ade20k import *
    from .._base_.plus import *

model['backbone'].update(attention=plus_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_plus_in22k/epoch_30.pth'))
