# Stage 3 of the demo, after both stages: backbone and head are fine-tuned, the head being the teacher's at first.
from mmengine.config import read_base

with read_base():
    from .teacher_demo_beacons import *
    from .._base_.schedules.demo import custom_hooks

stage2_init = dict(type='Pretrained', checkpoint='work_dirs/demo/stage2/iter_50.pth')
teacher_init = dict(type='Pretrained', checkpoint='work_dirs/demo/teacher/iter_500.pth')
model['backbone'].update(attention=linear, init_cfg=stage2_init)
model['decode_head'].update(init_cfg=dict(teacher_init, prefix='decode_head.'))
optim_wrapper['optimizer'].update(lr=1e-3)
optim_wrapper.update(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
train_cfg.update(max_iters=50, val_interval=50)
param_scheduler[-1].update(end=50)
default_hooks['checkpoint'].update(interval=50)
