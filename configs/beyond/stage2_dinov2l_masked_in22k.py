# Beyond the paper, stage 2: the student sees half of the patches, and learns the features of all.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *

model.update(mask_ratio=0.5)
