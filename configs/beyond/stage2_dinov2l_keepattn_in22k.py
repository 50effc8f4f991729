# Beyond the paper, stage 2: the loss of stage 1 is kept on.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *

model.update(attention_weight=50.0)
