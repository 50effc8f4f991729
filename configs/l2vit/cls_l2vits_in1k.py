# ImageNet-1K from scratch at 224 x 224 with L2ViT-S.
from mmengine.config import read_base

with read_base():
    from .cls_l2vitt_in1k import *

model['backbone'].update(arch='small', drop_path_rate=0.2)
