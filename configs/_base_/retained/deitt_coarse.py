# Which two blocks of DeiT-tiny keep softmax attention in the configs named coarse_retain2: measured, see
# docs/retained_blocks.md. The other blocks have 24 of 7 x 7 tiles open.
from mmengine.config import read_base

with read_base():
    from ..coarse_small import *

retained = (2, 4)
retained_softmax = [
    dict(type='adala_mm.SoftmaxAttention') if block in retained else dict(coarse_attention, num_open=24)
    for block in range(12)]
