# A linear head on the frozen features of the attention that is nearest to softmax, after stage 1.
from mmengine.config import read_base

with read_base():
    from .probe_deitt_camvid import *
    from .._base_.coarse_small import *

model['backbone'].update(attention=coarse_attention)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_deitt_coarse_caltech/iter_200.pth'))
