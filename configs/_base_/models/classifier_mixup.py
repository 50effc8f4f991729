# The linear classifier for training from scratch: mixup or cutmix for each batch, and label smoothing.
from mmengine.config import read_base

with read_base():
    from .classifier import *

model['head'].update(
    loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0))
model.update(train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))
