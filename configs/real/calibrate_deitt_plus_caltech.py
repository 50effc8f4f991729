# The recipe plus, between its stages: output projections in closed form, from stage 1's checkpoint.
from mmengine.config import read_base

with read_base():
    from .stage2_deitt_plus_caltech import *

train_cfg = dict(type='adala_mm.CalibrationLoop', max_iters=12, val_interval=12, images=512)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.0, weight_decay=0.0))  # no steps
param_scheduler = None
default_hooks['checkpoint'].update(interval=4)
default_hooks['logger'].update(interval=1)
