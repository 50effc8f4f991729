# The recipe coarse, calibration: output projections of SigLIP-L in closed form.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_siglipl_in22k import *
    from .._base_.coarse import *
    from .._base_.datasets.coco_images import *
    from .._base_.schedules.calibrate import *

model['backbone'].update(attention=coarse_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_siglipl_coarse_coco/epoch_4.pth'))
