# The attention that is nearest to softmax with half of its tiles open, stage 1, with two blocks kept softmax.
from mmengine.config import read_base

with read_base():
    from .stage1_deitt_coarse_caltech import *
    from .._base_.retained.deitt_coarse import *

model['backbone'].update(attention=retained_softmax)
optim_wrapper['optimizer'].update(lr=3e-4)  # this student is nearer than coarse: docs/trials.md
