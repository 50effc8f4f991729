# The recipe coarse, stage 3: SigLIP-L, Mask2Former on ADE20K.
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_siglipl_ade20k import *
    from .._base_.coarse import *

model['backbone'].update(attention=coarse_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_siglipl_coarse_in22k/epoch_10.pth'))
