# Stage 2 of DINOv2-L that ends once held-out features come no closer, 30 epochs at most (section 4.3.1).
# The best weights are kept as best_align_rel_error_epoch_<n>.pth: name that file in stage 3.
from mmengine.config import read_base

with read_base():
    from .stage2_dinov2l_in22k import *
    from .._base_.datasets.in1k_heldout import *

custom_hooks = [stop_on_plateau]
default_hooks['checkpoint'].update(save_best='align/rel_error', rule='less')
