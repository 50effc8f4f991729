# Section 4.3.3 with a linear head: the softmax segmentor teaches its linear twin on images of CamVid, without labels.
from mmengine.config import read_base

with read_base():
    from .probe_deitt_camvid import *

model.update(
    type='adala_mm.TaskModelAlignment',
    task_model='EncoderDecoder',
    teacher=dict(type='Pretrained', checkpoint='work_dirs/probe_deitt_softmax_camvid/iter_300.pth'))
# That segmentor's attentions are those of the pretrained DeiT-tiny, frozen: any stage 1 of it will do.
stage1_init = dict(type='Pretrained', checkpoint='work_dirs/stage1_deitt_caltech/iter_200.pth')
model['backbone'].update(trainable=None, init_cfg=stage1_init)
optim_wrapper['optimizer'].update(lr=1e-3)
optim_wrapper.pop('paramwise_cfg')
