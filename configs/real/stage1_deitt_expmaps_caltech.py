# Beyond the paper, stage 1: feature maps exp(Wx), exp(-Wx) with learnt W.
from mmengine.config import read_base

with read_base():
    from .stage1_deitt_caltech import *

model['backbone'].update(attention=dict(type='adala_mm.HedgehogAttention', variant='exp'))
