# Row of the ablation: stage 2 alone, the linear attention being swapped in just before.
from mmengine.config import read_base

with read_base():
    from .stage2_deitt_caltech import *

model['backbone'].update(init_cfg=pretrained)
