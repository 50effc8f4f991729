# Mask2Former on ADE20K at 512 x 512 with a vanilla linear ViT-L trained from scratch on ImageNet-1K (A.6).
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_in1kl_ade20k import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/scratch_in1kl_in1k/epoch_200.pth'))
