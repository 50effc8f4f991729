# The attention that is nearest to softmax, stage 1: a third of the paper's rate, falling to 0.
from mmengine.config import read_base

with read_base():
    from .stage1_deitt_caltech import *
    from .._base_.coarse_small import *

model['backbone'].update(attention=coarse_attention)
optim_wrapper['optimizer'].update(lr=1e-3)
param_scheduler = dict(type='PolyLR', power=0.9, end=200, by_epoch=False)
