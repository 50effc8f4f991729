# Native recipe of cosFormer: Mask2Former on Cityscapes at 512 x 512, in place of softmax, not aligned.
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_dinov2l_cityscapes import *
    from .._base_.attentions import *

model['backbone'].update(attention=cosformer, init_cfg=pretrained)
