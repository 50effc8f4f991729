# UPerNet on ADE20K at 512 x 512 with the L2ViT-T of cls_l2vitt_in1k.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.l2vitt import *
    from .._base_.datasets.ade20k import *
    from .._base_.models.upernet import *
    from .._base_.schedules.upernet_160k import *

backbone.update(drop_path_rate=0.3)
backbone.update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/cls_l2vitt_in1k/epoch_300.pth'))
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(size=crop_size, **preprocessor)
train_dataloader.update(batch_size=2, sampler=dict(type='InfiniteSampler', shuffle=True))
default_hooks.update(checkpoint=checkpoint_hook, logger=logger_hook)
