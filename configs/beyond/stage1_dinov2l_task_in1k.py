# Section 4.3.3, stage 1: the attentions of a classifier fine-tuned on ImageNet-1K, on its own images.
from mmengine.config import read_base

with read_base():
    from ..adala.stage1_dinov2l_coco import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/cls_dinov2l_softmax_in1k/epoch_10.pth'))
train_dataloader['dataset'].update(data_root='data/imagenet', data_prefix='train')
train_cfg.update(max_epochs=1)
