# Stage 2 alone (rows "Stage 2" of Tables 1 to 4 and 10 to 12): from the pretrained weights, without stage 1.
from mmengine.config import read_base

with read_base():
    from .stage2_dinov2l_in22k import *

model['backbone'].update(init_cfg=pretrained)
