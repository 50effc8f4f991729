# Table 3, neither stage: linear attention put in untrained, then Mask2Former on ADE20K.
from mmengine.config import read_base

with read_base():
    from .mask2former_dinov2l_ade20k import *

model['backbone'].update(init_cfg=pretrained)
