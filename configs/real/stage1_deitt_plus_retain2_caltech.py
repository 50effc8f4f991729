# The recipe plus, stage 1, with two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from .stage1_deitt_plus_caltech import *
    from .._base_.retained.deitt_plus import *

model['backbone'].update(attention=retained_softmax)
