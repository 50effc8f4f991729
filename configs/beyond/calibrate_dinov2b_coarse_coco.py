# The recipe coarse, calibration: output projections of DINOv2-B in closed form.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2b_in22k import *
    from .._base_.coarse import *
    from .._base_.datasets.coco_images import *
    from .._base_.schedules.calibrate import *

model['backbone'].update(attention=coarse_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2b_coarse_coco/epoch_4.pth'))
train_cfg.update(max_iters=12)
