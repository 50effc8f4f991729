# ImageNet-22K with its labels, one folder a class (21,841), at 224 x 224 and augmented as in1k_224; top-1 and top-5 are
# those of ImageNet-1K's kind, on data/imagenet22k_val with the same folders, which is for you to hold out.
from mmengine.config import read_base

with read_base():
    from .in1k_224 import *

train_dataloader['dataset'].update(type='CustomDataset', data_root='data/imagenet22k')
train_dataloader['dataset'].pop('split')
val_dataloader['dataset'].update(type='CustomDataset', data_root='data/imagenet22k_val')
val_dataloader['dataset'].pop('split')
test_dataloader = val_dataloader
