# Beyond the paper, stage 2: feature maps exp(Wx), exp(-Wx) with learnt W.
from mmengine.config import read_base

with read_base():
    from .stage2_deitt_caltech import *

model['backbone'].update(attention=dict(type='adala_mm.HedgehogAttention', variant='exp'))
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_deitt_expmaps_caltech/iter_200.pth'))
