# Native recipe of Hedgehog: ImageNet-1K classification at 512 x 512, all weights, after its attention distillation.
from mmengine.config import read_base

with read_base():
    from ..adala.cls_dinov2l_in1k import *
    from .._base_.attentions import *

model['backbone'].update(
    attention=hedgehog,
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_hedgehog_native_coco/epoch_4.pth'))
