# A linear head on the frozen features of the linear DeiT-tiny of both stages: what they hold of CamVid as they are.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.deitt import *
    from .._base_.datasets.camvid import *
    from .._base_.schedules.demo import *

stage2_init = dict(type='Pretrained', checkpoint='work_dirs/stage2_deitt_caltech/iter_1200.pth')
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', size=crop_size, bgr_to_rgb=True, pad_val=0, seg_pad_val=255,
        test_cfg=dict(size_divisor=16), **preprocessor),
    # Of the ViT only the scale and shift of the last LayerNorm learn, which the head could take over: it stays linear.
    backbone=dict(backbone, trainable=r'^norm\.', init_cfg=stage2_init),
    decode_head=dict(
        type='FCNHead', in_channels=192, channels=192, num_convs=0, concat_input=False, dropout_ratio=0.0,
        num_classes=num_classes, align_corners=False, loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
del backbone  # from here on it is model['backbone']
optim_wrapper['optimizer'].update(lr=1e-2)
optim_wrapper.update(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
custom_hooks = []
train_cfg.update(max_iters=300, val_interval=300)
param_scheduler[-1].update(end=300)
default_hooks.update(checkpoint=dict(checkpoint_hook, interval=300), logger=logger_hook)
