# ImageNet-1K from scratch at 224 x 224 with L2ViT-T. Drop path 0.1 for T and 0.2 for S is our choice; B has 0.3.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.l2vitt import *
    from .._base_.datasets.in1k_224 import *
    from .._base_.models.classifier_mixup import *
    from .._base_.schedules.l2vit_300e import *

backbone.update(out_indices=(3,), out_type='avg_featmap', drop_path_rate=0.1)
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(preprocessor)
model['head'].update(in_channels=widths[3])
default_hooks.update(visualization=visualization_hook)
