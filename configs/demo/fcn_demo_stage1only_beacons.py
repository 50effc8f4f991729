# Row of the ablation: stage 1 alone.
from mmengine.config import read_base

with read_base():
    from .fcn_demo_beacons import *

model['backbone'].update(init_cfg=dict(teacher_init, checkpoint='work_dirs/demo/stage1/iter_80.pth'))
