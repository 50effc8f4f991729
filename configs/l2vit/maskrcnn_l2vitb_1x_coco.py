# Mask R-CNN on COCO, 12 epochs, with the L2ViT-B of cls_l2vitb_in1k.
from mmengine.config import read_base

with read_base():
    from .maskrcnn_l2vitt_1x_coco import *

model['backbone'].update(arch='base', drop_path_rate=0.2)
model['backbone'].update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/cls_l2vitb_in1k/epoch_300.pth'))
model['neck'].update(in_channels=[128, 256, 512, 1024])
