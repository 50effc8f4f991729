# Section 4.3.3: a fine-tuned softmax classifier teaches its linear twin what its head reads; no labels are read.
# The schedule of stage 2, over the task's own images. Checkpoints are tested with the plain stage-3 config.
from mmengine.config import read_base

with read_base():
    from ..adala.cls_dinov2l_in1k import *
    from .._base_.schedules.stage2 import *

model.update(
    type='adala_mm.TaskModelAlignment',
    task_model='ImageClassifier',
    features=dict(mse=5.0),
    teacher=dict(type='Pretrained', checkpoint='work_dirs/cls_dinov2l_softmax_in1k/epoch_10.pth'))
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_task_in1k/epoch_1.pth'))
train_cfg.update(max_epochs=10)
param_scheduler.update(end=10)
auto_scale_lr.update(base_batch_size=64)
