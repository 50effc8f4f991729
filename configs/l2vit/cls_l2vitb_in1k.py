# ImageNet-1K from scratch at 224 x 224 with L2ViT-B.
from mmengine.config import read_base

with read_base():
    from .cls_l2vitt_in1k import *

model['backbone'].update(arch='base', drop_path_rate=0.3)
model['head'].update(in_channels=1024)
