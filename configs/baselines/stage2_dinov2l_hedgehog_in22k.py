# Stage 2 of the AdaLA recipe with Hedgehog attention: the final features of DINOv2-L, on ImageNet-22K.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *
    from .._base_.attentions import *

model['backbone'].update(
    attention=hedgehog,
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_hedgehog_coco/epoch_4.pth'))
