# Ablation: stage 2 without stage 1, straight from the teacher's weights.
from mmengine.config import read_base

with read_base():
    from .stage2_demo_beacons import *

model['backbone'].update(init_cfg=teacher_init)
