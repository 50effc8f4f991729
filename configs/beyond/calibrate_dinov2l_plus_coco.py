# The recipe plus, between its stages: output projections in closed form, from stage 1's checkpoint.
from mmengine.config import read_base

with read_base():
    from .stage2_dinov2l_plus_in22k import *
    from .._base_.datasets.coco_images import *
    from .._base_.schedules.calibrate import *
