# Beyond the paper, stage 2: the loss of stage 1 is kept on.
from mmengine.config import read_base

with read_base():
    from .stage2_deitt_caltech import *

model.update(attention_weight=50.0)
