# Section 4.3.3 on real photographs, stage 1: the attentions of the segmentor fine-tuned on CamVid, on its own images.
from mmengine.config import read_base

with read_base():
    from .stage1_deitt_caltech import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/mask2former_deitt_softmax_camvid/iter_250.pth'))
train_dataloader['dataset'].update(data_root='data/camvid11', ann_file='', data_prefix='images/train')
train_dataloader['dataset'].update(type='adala_mm.ImageFiles')
train_dataloader['dataset'].pop('with_label')
model.pop('head')  # that of ImageNet has nothing to say of a segmentor
