# Stage 2 on real weights and photographs: 1,200 iterations of batch 16.
from mmengine.config import read_base

with read_base():
    from .stage1_deitt_caltech import *

model = dict(
    type='adala_mm.FeatureAlignment',
    teacher=dict(model['backbone'], attention=softmax),
    backbone=dict(
        model['backbone'],
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_deitt_caltech/iter_200.pth')),
    loss_scale=1.0,
    head=dict(checkpoint=pretrained['checkpoint']),
    data_preprocessor=dict(type='ImgDataPreprocessor', bgr_to_rgb=True, **preprocessor))
optim_wrapper['optimizer'].update(lr=1e-3)
param_scheduler = dict(type='PolyLR', power=0.9, end=1200, by_epoch=False)
train_cfg.update(max_iters=1200, val_interval=300)
default_hooks['checkpoint'].update(interval=300)
