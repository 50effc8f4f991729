# Section 4.3.3 on real photographs: the fine-tuned softmax segmentor teaches its linear twin; no labels are read.
from mmengine.config import read_base

with read_base():
    from .mask2former_deitt_camvid import *

model.update(
    type='adala_mm.TaskModelAlignment',
    task_model='EncoderDecoder',
    teacher=dict(type='Pretrained', checkpoint='work_dirs/mask2former_deitt_softmax_camvid/iter_250.pth'))
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_deitt_task_camvid/iter_200.pth'))
optim_wrapper.pop('paramwise_cfg')
