# Which two blocks of DeiT-tiny keep softmax attention in the configs named plus_retain2: measured, see docs/beyond.md.
from mmengine.config import read_base

with read_base():
    from ..plus import *

retained = (0, 1)
retained_softmax = [
    dict(type='adala_mm.SoftmaxAttention') if block in retained else plus_attention for block in range(12)]
