# Mask R-CNN (He et al. 2017) with an FPN on a hierarchical backbone: mmdet's mask-rcnn_r50_fpn but for the backbone.
# BatchNorm, of the backbone too, is synchronised where several processes train: 2 images each are few for it.
from mmengine.config import read_base

with read_base():
    from .mask_rcnn import *

sync_bn = 'torch'
model['data_preprocessor'].update(pad_size_divisor=32)
model.pop('neck')
model.update(neck=dict(type='FPN', in_channels=[96, 192, 384, 768], out_channels=256, num_outs=5))
model['rpn_head'].pop('num_convs')
model['roi_head']['bbox_head'].update(type='Shared2FCBBoxHead')
for name in ('norm_cfg', 'conv_out_channels'):
    model['roi_head']['bbox_head'].pop(name)
model['roi_head']['mask_head'].pop('norm_cfg')
del name, norm_cfg
