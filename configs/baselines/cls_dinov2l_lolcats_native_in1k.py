# Native recipe of LoLCATS: ImageNet-1K classification at 512 x 512, low-rank updates after its attention transfer.
from mmengine.config import read_base

with read_base():
    from ..adala.cls_dinov2l_in1k import *
    from .._base_.attentions import *

model['backbone'].update(
    attention=lolcats, trainable=r'\.lora\.',
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_lolcats_native_coco/epoch_2.pth'))
# The rate of the head, 1e-4, as published: a backbone's tenth of it is meant for pretrained weights.
optim_wrapper['paramwise_cfg']['custom_keys'].update({'attn.lora': dict(lr_mult=1.0)})
