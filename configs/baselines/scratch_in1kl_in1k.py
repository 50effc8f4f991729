# Vanilla linear ViT-L/16 from scratch on ImageNet-1K, 200 epochs, for the comparison of A.6. The paper says no more;
# our choice is the usual supervised recipe for ViTs (DeiT III, AugReg): 224 px, 8 GPUs x 128 images, AdamW with warm-up
# and cosine, RandAugment, mixup, CutMix, label smoothing, drop path, no weight decay on norms and biases.
from mmengine.config import read_base

with read_base():
    from .._base_.default_runtime import *
    from .._base_.backbones.in1kl import *
    from .._base_.datasets.in1k_224 import *
    from .._base_.models.classifier_mixup import *

epochs = 200
backbone.update(img_size=224, out_type='cls_token', drop_path_rate=0.1, init_cfg=None)
model.update(backbone=backbone)
del backbone  # from here on it is model['backbone']
model['data_preprocessor'].update(preprocessor)
default_hooks.update(visualization=visualization_hook)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(flat_decay_mult=0.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=5, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=5, end=epochs, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
