# ImageNet-22K as plain images, found recursively below data/imagenet22k (stage 2). From a file list or tar shards instead:
#   --cfg-options train_dataloader.dataset.ann_file=list.txt
#   --cfg-options 'train_dataloader.dataset.shards=in22k-{000000..000999}.tar'
from mmengine.config import read_base

with read_base():
    from .coco_images import *

train_dataloader.update(batch_size=16)
train_dataloader['dataset'].update(data_root='data/imagenet22k', data_prefix='', index_dir='work_dirs/indices')
