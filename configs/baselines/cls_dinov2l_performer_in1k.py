# Stage 3 of the AdaLA recipe with Performer attention: ImageNet-1K classification at 512 x 512.
from mmengine.config import read_base

with read_base():
    from ..adala.cls_dinov2l_in1k import *
    from .._base_.attentions import *

model['backbone'].update(
    attention=performer,
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_performer_in22k/epoch_30.pth'))
