# Beyond the paper, stage 1: two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from .stage1_deitt_caltech import *
    from .._base_.retained.deitt import *

model['backbone'].update(attention=retained_softmax)
