# ImageNet-1K at 384 x 384, augmented as in1k_224; in validation the whole image is brought to that size (ConvNeXt).
from mmengine.config import read_base

with read_base():
    from .in1k_224 import *

train_pipeline[1].update(scale=384)
test_pipeline[1:3] = [dict(type='Resize', scale=(384, 384), interpolation='bicubic')]
train_dataloader.update(batch_size=64)
train_dataloader['dataset'].update(pipeline=train_pipeline)
val_dataloader['dataset'].update(pipeline=test_pipeline)
test_dataloader = val_dataloader
