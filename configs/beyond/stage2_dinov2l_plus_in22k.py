# The recipe plus, stage 2: all layers are compared, at half the paper's rate.
from mmengine.config import read_base

with read_base():
    from ..adala.stage2_dinov2l_in22k import *
    from .._base_.plus import *

model['backbone'].update(attention=plus_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_plus_coco/epoch_4.pth'))
model.update(layers=list(range(24)))
optim_wrapper['optimizer'].update(lr=5e-4)
