# The teacher: a small softmax ViT and a linear segmentation head, trained from scratch.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.demo import *
    from .._base_.datasets.beacons import *
    from .._base_.schedules.demo import *

model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(80, 80), seg_pad_val=255, **image_norm),
    backbone=backbone,
    decode_head=dict(  # one 1 x 1 convolution: nothing but the features can tell classes apart
        type='FCNHead', in_channels=96, channels=96, num_convs=0, concat_input=False, num_classes=6,
        dropout_ratio=0.0, align_corners=False, loss_decode=dict(type='CrossEntropyLoss')),
    test_cfg=dict(mode='whole'))
del backbone  # from here on it is model['backbone']
optim_wrapper['optimizer'].update(lr=1.5e-3)
custom_hooks = []
train_cfg.update(max_iters=500, val_interval=500)
param_scheduler[-1].update(end=500)
default_hooks.update(checkpoint=dict(checkpoint_hook, interval=500), logger=logger_hook)
