# Stage 1 as LoLCATS does it: the feature maps alone learn the output of each head of softmax attention.
# Published: AdamW, lr 1e-2, no weight decay, 2 epochs. Left out: ReduceLROnPlateau, which watches a held-out loss
# that this stage has not, and the loss's factor of 1000, which AdamW does not notice.
from mmengine.config import read_base

with read_base():
    from ..adala.stage1_dinov2l_coco import *
    from .._base_.attentions import *

model.update(target='heads')
model['backbone'].update(attention=lolcats, trainable='feature_map')
optim_wrapper['optimizer'].update(weight_decay=0.0)
train_cfg.update(max_epochs=2)
