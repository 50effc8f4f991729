# Baseline: Mask2Former on ADE20K at 512 x 512 with the original softmax SigLIP 2-L, same schedule.
from mmengine.config import read_base

with read_base():
    from .mask2former_siglip2l_ade20k import *

model['backbone'].update(attention=softmax, init_cfg=pretrained)
