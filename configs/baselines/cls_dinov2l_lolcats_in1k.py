# Stage 3 of the AdaLA recipe with LoLCATS attention: ImageNet-1K classification at 512 x 512.
# Of the backbone, only the low-rank updates learn.
from mmengine.config import read_base

with read_base():
    from ..adala.cls_dinov2l_in1k import *
    from .._base_.attentions import *

model['backbone'].update(
    attention=lolcats, trainable=r'\.lora\.',
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_lolcats_in22k/epoch_30.pth'))
