# ImageNet-1K classification at 512 x 512 with a vanilla linear ViT-L trained from scratch on ImageNet-1K (A.6).
from mmengine.config import read_base

with read_base():
    from ..adala.cls_in1kl_in1k import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/scratch_in1kl_in1k/epoch_200.pth'))
