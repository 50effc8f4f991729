# Stage 1 of the demo: the teacher's attentions become linear, block by block.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.demo import *
    from .._base_.datasets.beacons_images import *
    from .._base_.schedules.demo import *

teacher_init = dict(type='Pretrained', checkpoint='work_dirs/demo/teacher/iter_500.pth')
model = dict(
    type='adala_mm.AttentionAlignment',
    backbone=dict(backbone, attention=linear, init_cfg=teacher_init),
    data_preprocessor=dict(type='ImgDataPreprocessor', **image_norm))
del backbone  # from here on it is model['backbone']
optim_wrapper['optimizer'].update(lr=3e-3)
train_cfg.update(max_iters=80, val_interval=80)
param_scheduler[-1].update(end=80)
default_hooks.update(checkpoint=dict(checkpoint_hook, interval=80), logger=logger_hook)
