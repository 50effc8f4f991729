# The recipe plus, stage 1: learnt exponential feature maps, convolved values, a rate that falls.
from mmengine.config import read_base

with read_base():
    from .stage1_deitt_caltech import *
    from .._base_.plus import *

model['backbone'].update(attention=plus_attention)
optim_wrapper['optimizer'].update(lr=6e-3)
param_scheduler = dict(type='PolyLR', power=0.9, end=200, by_epoch=False)
