# Stage 3 on real photographs with the loss of stage 1 kept on.
from mmengine.config import read_base

with read_base():
    from .mask2former_deitt_camvid import *

model.update(
    type='adala_mm.TaskModelAlignment',
    task_model='EncoderDecoder',
    features={},
    task_weight=1.0,
    attention_weight=50.0,
    trainable=None,
    teacher=dict(type='Pretrained', checkpoint='work_dirs/mask2former_deitt_softmax_camvid/iter_250.pth'))
