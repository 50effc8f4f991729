# Stage 3 after stages beyond the paper: the student sees half of the patches, and learns the features of all.
from mmengine.config import read_base

with read_base():
    from .mask2former_deitt_camvid import *

model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_deitt_masked_caltech/iter_1200.pth'))
