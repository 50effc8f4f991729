# Row of the ablation: the softmax teacher itself, fine-tuned on the same schedule.
from mmengine.config import read_base

with read_base():
    from .fcn_demo_beacons import *

model['backbone'].update(attention=softmax, init_cfg=teacher_init)
