# Stage 2 of the AdaLA recipe with Linformer attention: the final features of DINOv2-L, on ImageNet-22K.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *
    from .._base_.attentions import *

model['backbone'].update(
    attention=linformer,
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_linformer_coco/epoch_4.pth'))
