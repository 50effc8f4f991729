# Stage 1 on real weights and photographs: 200 iterations of batch 16.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.deitt import *
    from .._base_.datasets.caltech101 import *

model = dict(
    type='adala_mm.AttentionAlignment',
    backbone=backbone,
    head=dict(checkpoint=pretrained['checkpoint']),  # scores top-1 agreement with the teacher
    data_preprocessor=dict(type='ImgDataPreprocessor', bgr_to_rgb=True, **preprocessor))
del backbone  # from here on it is model['backbone']
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=200, val_interval=200)
custom_hooks = [dict(type='adala_mm.ValBeforeTrainHook')]
log_processor.update(by_epoch=False)
default_hooks['checkpoint'] = dict(type='CheckpointHook', by_epoch=False, interval=200, max_keep_ckpts=2)
default_hooks['logger'] = dict(type='LoggerHook', interval=10, log_metric_by_epoch=False)
