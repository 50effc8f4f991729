# UPerNet on ADE20K at 512 x 512 with the L2ViT-S of cls_l2vits_in1k.
from mmengine.config import read_base

with read_base():
    from .upernet_l2vitt_ade20k import *

model['backbone'].update(arch='small')
model['backbone'].update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/cls_l2vits_in1k/epoch_300.pth'))
