# Row of the ablation: linear attention put in untrained.
from mmengine.config import read_base

with read_base():
    from .fcn_demo_beacons import *

model['backbone'].update(init_cfg=teacher_init)
