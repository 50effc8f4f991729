# Mask R-CNN on COCO, 36 epochs, with the L2ViT-B of cls_l2vitb_in1k. Drop path 0.3 is the authors'.
from mmengine.config import read_base

with read_base():
    from .maskrcnn_l2vitb_1x_coco import *

model['backbone'].update(drop_path_rate=0.3)
train_cfg.update(max_epochs=36)
param_scheduler[-1].update(milestones=[27, 33], end=36)
