# Stage 3 with the loss of stage 1 kept on: the linear classifier learns its task, and its attentions
# to answer as those of the fine-tuned softmax one.
from mmengine.config import read_base

with read_base():
    from ..adala.cls_dinov2l_in1k import *

model.update(
    type='adala_mm.TaskModelAlignment',
    task_model='ImageClassifier',
    features={},
    task_weight=1.0,
    attention_weight=50.0,
    trainable=None,
    teacher=dict(type='Pretrained', checkpoint='work_dirs/cls_dinov2l_softmax_in1k/epoch_10.pth'))
