# The best recipe that we know, between its stages: output projections in closed form, from stage 1's checkpoint.
from mmengine.config import read_base

with read_base():
    from .stage2_dinov2l_plus_in22k import *
    from .._base_.datasets.coco_images import *

train_cfg = dict(type='adala_mm.CalibrationLoop', max_iters=24, images=512)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.0, weight_decay=0.0))  # no steps
param_scheduler = None
log_processor.update(by_epoch=False)
default_hooks['checkpoint'].update(by_epoch=False, interval=4)
default_hooks['logger'].update(interval=1, log_metric_by_epoch=False)
