# Beyond the paper, stage 2: the outputs of four blocks are compared, not of the last alone.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *

model.update(layers=[5, 11, 17, 23])
