# Stage 2 of the demo: the linear ViT of stage 1 learns the teacher's final features.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.demo import *
    from .._base_.datasets.beacons_images import *
    from .._base_.schedules.demo import *

teacher_init = dict(type='Pretrained', checkpoint='work_dirs/demo/teacher/iter_500.pth')
stage1_init = dict(type='Pretrained', checkpoint='work_dirs/demo/stage1/iter_80.pth')
model = dict(
    type='adala_mm.FeatureAlignment',
    teacher=dict(backbone, init_cfg=teacher_init),
    backbone=dict(backbone, attention=linear, init_cfg=stage1_init),
    data_preprocessor=dict(type='ImgDataPreprocessor', **image_norm))
del backbone  # from here on it is model['backbone']
train_cfg.update(max_iters=50, val_interval=50)
param_scheduler[-1].update(end=50)
default_hooks.update(checkpoint=dict(checkpoint_hook, interval=50), logger=logger_hook)
