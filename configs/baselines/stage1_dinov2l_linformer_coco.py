# Stage 1 of the AdaLA recipe with Linformer attention: q, k, v and its two sums over tokens learn softmax's output.
from mmengine.config import read_base

with read_base():
    from ..adala.stage1_dinov2l_coco import *
    from .._base_.attentions import *

model['backbone'].update(attention=linformer)
