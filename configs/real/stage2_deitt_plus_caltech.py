# The recipe plus, stage 2: all layers are compared, at half the paper's rate.
from mmengine.config import read_base

with read_base():
    from .stage2_deitt_caltech import *
    from .._base_.plus import *

model['backbone'].update(attention=plus_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_deitt_plus_caltech/iter_200.pth'))
model.update(layers=list(range(12)))
optim_wrapper['optimizer'].update(lr=5e-4)
