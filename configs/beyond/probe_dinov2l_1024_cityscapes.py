# A linear probe on Cityscapes at 1024 x 1024: what the frozen features of the aligned linear DINOv2-L hold.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.dinov2l import *
    from .._base_.datasets.cityscapes_1024 import *
    from .._base_.models.probe_segmentor import *
    from .._base_.schedules.probe_40k import *

backbone.update(trainable=r'^norm\.')
backbone.update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_in22k/epoch_30.pth'))
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(size=crop_size, **preprocessor)
model['decode_head'].update(num_classes=num_classes)
train_dataloader.update(batch_size=2, sampler=dict(type='InfiniteSampler', shuffle=True))
default_hooks.update(checkpoint=checkpoint_hook, logger=logger_hook)
