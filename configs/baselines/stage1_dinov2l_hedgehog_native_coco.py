# Stage 1 as Hedgehog does it: the feature maps alone learn softmax's attention weights, by soft cross-entropy.
from mmengine.config import read_base

with read_base():
    from ..adala.stage1_dinov2l_coco import *
    from .._base_.attentions import *

model.update(target='weights')
model['backbone'].update(attention=hedgehog, trainable='feature_map')
