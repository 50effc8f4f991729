# Section 4.3.3, stage 1: the attentions of a segmentor fine-tuned on ADE20K.
# On its own images, as many of them as in 4 epochs of COCO.
from mmengine.config import read_base

with read_base():
    from ..adala.stage1_dinov2l_coco import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/mask2former_dinov2l_softmax_ade20k/epoch_20.pth'))
train_dataloader['dataset'].update(data_root='data/ade/ADEChallengeData2016', data_prefix='images/training')
train_cfg.update(max_epochs=24)
