# Stage 2 of the AdaLA recipe with cosFormer attention: the final features of DINOv2-L, on ImageNet-22K.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *
    from .._base_.attentions import *

model['backbone'].update(
    attention=cosformer,
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_cosformer_coco/epoch_4.pth'))
