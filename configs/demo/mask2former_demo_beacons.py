# The flagship's Mask2Former in small, on the linear ViT of both stages.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.demo import *
    from .._base_.datasets.beacons import *
    from .._base_.schedules.demo import *
    from .._base_.models.mask2former_small import *

stage2_init = dict(type='Pretrained', checkpoint='work_dirs/demo/stage2/iter_50.pth')
model.update(backbone=dict(backbone, attention=linear, out_indices=[-1] * 4, init_cfg=stage2_init))
del backbone  # from here on it is model['backbone']
model['data_preprocessor'] = dict(
    type='SegDataPreProcessor', size=(80, 80), seg_pad_val=255, test_cfg=dict(size_divisor=8), **image_norm)
model['neck'].update(embed_dim=96)
model['decode_head'].update(num_classes=6, in_channels=[96] * 4, strides=[2, 4, 8, 16], num_queries=20)
model['decode_head']['loss_cls'].update(class_weight=[1.0] * 6 + [0.1])
train_dataloader.update(batch_size=8)
auto_scale_lr.update(base_batch_size=8)
optim_wrapper['optimizer'].update(lr=2e-3)
optim_wrapper.update(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
custom_hooks = []
train_cfg.update(max_iters=60, val_interval=60)
param_scheduler[-1].update(end=60)
default_hooks.update(checkpoint=dict(checkpoint_hook, interval=60), logger=logger_hook)
