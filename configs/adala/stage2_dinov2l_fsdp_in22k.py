# Stage 2 of DINOv2-L, student sharded over all GPUs (FSDP), activations recomputed: for models that do not fit else.
# The frozen teacher stays whole on each GPU. Start it with tools/dist_train.sh; checkpoints are ordinary ones.
from mmengine.config import read_base

with read_base():
    from .stage2_dinov2l_in22k import *

runner_type = 'adala_mm.ShardedRunner'
model['backbone'].update(with_cp=True)
