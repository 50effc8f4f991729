# Stage 1 of the AdaLA recipe with Nystromformer attention: q, k, v learn softmax's output.
from mmengine.config import read_base

with read_base():
    from ..adala.stage1_dinov2l_coco import *
    from .._base_.attentions import *

model['backbone'].update(attention=nystromformer)
