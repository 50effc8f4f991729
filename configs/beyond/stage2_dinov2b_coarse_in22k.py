# The recipe coarse, stage 2: DINOv2-B, all layers and the class token are compared, at a hundredth of the paper's rate.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2b_in22k import *
    from .._base_.coarse import *

model['backbone'].update(attention=coarse_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/calibrate_dinov2b_coarse_coco/iter_12.pth'))
model.update(layers=list(range(12)), loss=dict(mse=5.0, class_token=1.0), loss_scale=1.0)
optim_wrapper['optimizer'].update(lr=1e-5)
