# Native recipe of Monarch: Mask2Former on ADE20K at 512 x 512, in place of softmax, not aligned.
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_dinov2l_ade20k import *
    from .._base_.attentions import *

model['backbone'].update(attention=monarch, init_cfg=pretrained)
