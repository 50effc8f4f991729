# ImageNet-1K at 224 x 224 with RandAugment and random erasing, as ConvNeXt, DeiT and Swin are trained.
from mmengine.config import read_base

with read_base():
    from .in1k_512 import *

train_pipeline[1].update(scale=224)
train_pipeline[3:3] = [
    dict(
        type='RandAugment', policies='timm_increasing', num_policies=2, total_level=10, magnitude_level=9,
        magnitude_std=0.5, hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic')),
    dict(
        type='RandomErasing', erase_prob=0.25, mode='rand', min_area_ratio=0.02, max_area_ratio=1 / 3,
        fill_color=[103.53, 116.28, 123.675], fill_std=[57.375, 57.12, 58.395]),  # BGR, as images are read
]
test_pipeline[1].update(scale=256)
test_pipeline[2].update(crop_size=224)
train_dataloader.update(batch_size=128)
train_dataloader['dataset'].update(pipeline=train_pipeline)
val_dataloader.update(batch_size=128)
val_dataloader['dataset'].update(pipeline=test_pipeline)
test_dataloader = val_dataloader
