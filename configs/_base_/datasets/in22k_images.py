# ImageNet-22K as plain images, found recursively below data/imagenet22k (stage 2).
from mmengine.config import read_base

with read_base():
    from .coco_images import *

train_dataloader.update(batch_size=16)
train_dataloader['dataset'].update(data_root='data/imagenet22k', data_prefix='')
