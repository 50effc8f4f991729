# The attention that is nearest to softmax, stage 2: all layers and the class token are compared, at a hundredth of the
# paper's rate.
from mmengine.config import read_base

with read_base():
    from .stage2_deitt_caltech import *
    from .._base_.coarse_small import *

model['backbone'].update(attention=coarse_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_deitt_coarse_caltech/iter_200.pth'))
model.update(layers=list(range(12)), loss=dict(mse=5.0, class_token=1.0))
optim_wrapper['optimizer'].update(lr=1e-5)
