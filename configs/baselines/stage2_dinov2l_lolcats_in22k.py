# Stage 2 of the AdaLA recipe with LoLCATS attention: the final features of DINOv2-L, on ImageNet-22K.
# Only the low-rank updates learn: the feature maps stay as stage 1 left them, the rest as in the teacher.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *
    from .._base_.attentions import *

model['backbone'].update(
    attention=lolcats, trainable=r'\.lora\.',
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_lolcats_coco/epoch_4.pth'))
