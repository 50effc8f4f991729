# Table 9 (A.7): stage 2 that tunes the query, key and value projections only. A.7 names no stage; what it tells of is
# distilling, stage 1 tunes nothing else anyway, and stage 3 stays as it is.
from mmengine.config import read_base

with read_base():
    from .stage2_dinov2l_in22k import *

model['backbone'].update(trainable=r'attn\.qkv\.')
