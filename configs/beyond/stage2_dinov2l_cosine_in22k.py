# Beyond the paper, stage 2: IronViT's terms instead of mean squared errors.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *

model.update(loss=dict(cosine=0.9, smooth_l1=0.1, class_token=1.0), loss_scale=1.0)
