# Stage 3 with the loss of stage 1 kept on: backbone and linear head learn from labels, attentions from a teacher too.
from mmengine.config import read_base

with read_base():
    from .probe_deitt_camvid import *

model.update(
    type='adala_mm.TaskModelAlignment',
    task_model='EncoderDecoder',
    features={},
    task_weight=1.0,
    attention_weight=50.0,
    trainable=None,
    teacher=dict(type='Pretrained', checkpoint='work_dirs/probe_deitt_softmax_camvid/iter_300.pth'))
model['backbone'].update(trainable=None)
