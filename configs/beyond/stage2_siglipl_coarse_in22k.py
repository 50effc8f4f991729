# The recipe coarse, stage 2: SigLIP-L, all layers are compared, at a hundredth of the paper's rate.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_siglipl_in22k import *
    from .._base_.coarse import *

model['backbone'].update(attention=coarse_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/calibrate_siglipl_coarse_coco/iter_24.pth'))
model.update(layers=list(range(24)))
optim_wrapper['optimizer'].update(lr=1e-5)
