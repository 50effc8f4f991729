# Native recipe of cosFormer: ImageNet-1K classification at 512 x 512, in place of softmax, not aligned.
from mmengine.config import read_base

with read_base():
    from ..adala.cls_dinov2l_in1k import *
    from .._base_.attentions import *

model['backbone'].update(attention=cosformer, init_cfg=pretrained)
