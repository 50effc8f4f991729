# Stage 3 with the loss of stage 1 kept on: the linear segmentor learns its task, and its attentions
# to answer as those of the fine-tuned softmax one.
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_dinov2l_ade20k import *

model.update(
    type='adala_mm.TaskModelAlignment',
    task_model='EncoderDecoder',
    features={},
    task_weight=1.0,
    attention_weight=50.0,
    trainable=None,
    teacher=dict(type='Pretrained', checkpoint='work_dirs/mask2former_dinov2l_softmax_ade20k/epoch_20.pth'))
