# Cityscapes, 19 classes, 1024 x 1024 crops of full-size images (2048 x 1024).
from mmengine.config import read_base

with read_base():
    from .cityscapes import *

crop_size = (1024, 1024)
train_pipeline[2].update(scales=[int(1024 * x * 0.1) for x in range(5, 21)], max_size=4096)
train_pipeline[3].update(crop_size=crop_size)
test_pipeline[1].update(scale=(2048, 1024))
train_dataloader['dataset'].update(pipeline=train_pipeline)
val_dataloader['dataset'].update(pipeline=test_pipeline)
test_dataloader = val_dataloader
