# The twin of probe_deitt_camvid on the frozen features of the softmax DeiT-tiny.
from mmengine.config import read_base

with read_base():
    from .probe_deitt_camvid import *

model['backbone'].update(attention=dict(type='adala_mm.SoftmaxAttention'))
model['backbone'].update(init_cfg=pretrained)
