# ImageNet-22K from scratch at 224 x 224 with L2ViT-B, which cls_l2vitb_384_in1k starts from. Drop path 0.2 is the
# authors'; augmentations are those of ImageNet-1K, which their command leaves on.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.l2vitt import *
    from .._base_.datasets.in22k_224 import *
    from .._base_.models.classifier_mixup import *
    from .._base_.schedules.l2vit_in22k_90e import *

backbone.update(arch='base', out_indices=(3,), out_type='avg_featmap', drop_path_rate=0.2)
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(preprocessor, num_classes=21841)
model['head'].update(in_channels=1024, num_classes=21841)
default_hooks.update(visualization=visualization_hook)
