# Calibration in closed form (docs/beyond.md): an iteration refits one of 24 blocks, on 512 images. There are no steps.
from mmengine.config import read_base

with read_base():
    from ..default_runtime import *

train_cfg = dict(type='adala_mm.CalibrationLoop', max_iters=24, images=512)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.0, weight_decay=0.0))
param_scheduler = None
log_processor.update(by_epoch=False)
default_hooks['checkpoint'].update(by_epoch=False, interval=4)
default_hooks['logger'].update(interval=1, log_metric_by_epoch=False)
