# ImageNet-1K at 384 x 384 with the L2ViT-B of cls_l2vitb_in22k and windows of 12 x 12: the paper's 87.0. The head
# begins anew; the authors take it from that of ImageNet-22K, by a list of classes of their own copy of it.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.l2vitt import *
    from .._base_.datasets.in1k_384 import *
    from .._base_.models.classifier_mixup import *
    from .._base_.schedules.l2vit_finetune_30e import *

backbone.update(arch='base', window_size=12, out_indices=(3,), out_type='avg_featmap', drop_path_rate=0.2)
backbone.update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/cls_l2vitb_in22k/epoch_90.pth'))
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(preprocessor)
model['head'].update(in_channels=1024)
default_hooks.update(visualization=visualization_hook)
