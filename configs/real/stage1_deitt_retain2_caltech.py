# Beyond the paper, stage 1: two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from .._base_.retained.deitt import *
    from .stage1_deitt_caltech import *

model['backbone'].update(attention=retained_softmax)
