# Beyond the paper, stage 3: an encoder-only mask head on ADE20K at 512 x 512, softmax attention in the four blocks
# that its queries join, linear attention in the others.
from mmengine.config import read_base

with read_base():
    from .eomt_dinov2l_ade20k import *
    from .._base_.retained.dinov2l_last4 import *

model['backbone'].update(attention=last4)
model['backbone'].update(
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage2_dinov2l_last4_in22k/epoch_30.pth'))
