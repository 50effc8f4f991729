# The recipe coarse, stage 1: DINOv2-L, tokens of open tiles and means of the others, a rate that falls.
from mmengine.config import read_base

with read_base():
    from ..adala.stage1_dinov2l_coco import *
    from .._base_.coarse import *

model['backbone'].update(attention=coarse_attention)
optim_wrapper['optimizer'].update(lr=3e-3)
param_scheduler = dict(type='PolyLR', power=0.9, end=4, by_epoch=True, convert_to_iter_based=True)
