# COCO 2017 boxes and masks, 80 classes: sizes of coco_detection but for the crops' (Swin's, which L2ViT takes over).
from mmengine.config import read_base

with read_base():
    from .coco_detection import *

train_pipeline[1].update(with_mask=True)
train_pipeline[3]['transforms'][1][0].update(scales=[(400, 1333), (500, 1333), (600, 1333)])
test_pipeline[2].update(with_mask=True)
train_dataloader['dataset'].update(
    filter_cfg=dict(filter_empty_gt=True, min_size=32), pipeline=train_pipeline)
val_dataloader['dataset'].update(pipeline=test_pipeline)
test_dataloader = val_dataloader
val_evaluator.update(metric=['bbox', 'segm'])
test_evaluator = val_evaluator
