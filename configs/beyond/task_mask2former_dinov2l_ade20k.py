# Section 4.3.3: a fine-tuned softmax segmentor teaches its linear twin what its head reads; no labels are read.
# The schedule of stage 2, over the task's own images. Checkpoints are tested with the plain stage-3 config.
from mmengine.config import read_base

with read_base():
    from ..adala.mask2former_dinov2l_ade20k import *
    from .._base_.schedules.stage2 import *

model.update(
    type='adala_mm.TaskModelAlignment',
    task_model='EncoderDecoder',
    features=dict(mse=5.0),
    teacher=dict(type='Pretrained', checkpoint='work_dirs/mask2former_dinov2l_softmax_ade20k/epoch_20.pth'))
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_task_ade20k/epoch_24.pth'))
train_cfg.update(max_epochs=20)
param_scheduler.update(end=20)
auto_scale_lr.update(base_batch_size=64)
