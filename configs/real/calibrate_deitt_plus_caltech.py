# The recipe plus, between its stages: output projections in closed form, from stage 1's checkpoint.
from mmengine.config import read_base

with read_base():
    from .stage2_deitt_plus_caltech import *
    from .._base_.schedules.calibrate import *

train_cfg.update(max_iters=12, val_interval=12)
default_hooks['checkpoint'].update(max_keep_ckpts=2)
