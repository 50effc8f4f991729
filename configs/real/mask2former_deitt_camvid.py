# Stage 3 on real photographs: a small Mask2Former on CamVid with the linear DeiT-tiny of both stages.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.deitt import *
    from .._base_.datasets.camvid import *
    from .._base_.models.mask2former_small import *
    from .._base_.schedules.demo import *

stage2_init = dict(type='Pretrained', checkpoint='work_dirs/stage2_deitt_caltech/iter_1200.pth')
model.update(backbone=dict(backbone, out_indices=[-1] * 4, init_cfg=stage2_init))
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(size=crop_size, **preprocessor)
model['decode_head'].update(num_classes=num_classes)
model['decode_head']['loss_cls'].update(class_weight=[1.0] * num_classes + [0.1])
optim_wrapper['optimizer'].update(lr=1e-3)
optim_wrapper.update(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
custom_hooks = []
train_cfg.update(max_iters=250, val_interval=250)
param_scheduler[-1].update(end=250)
default_hooks.update(checkpoint=dict(checkpoint_hook, interval=250), logger=logger_hook)
