# Baseline: an encoder-only mask head on ADE20K at 512 x 512 with the original softmax DINOv2-L, same schedule.
from mmengine.config import read_base

with read_base():
    from .eomt_dinov2l_ade20k import *

model['backbone'].update(attention=softmax, init_cfg=pretrained)
