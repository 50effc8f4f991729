# Row of the ablation: coarse-to-fine attention put in untrained. The grid of 10 x 10 patches has 25 tiles of 2 x 2, of
# which each block of 4 x 4 queries opens 8: a query meets 32 patches and 17 means instead of 100 patches. On so small a
# grid that is no quicker than softmax; the row shows what is kept.
from mmengine.config import read_base

with read_base():
    from .fcn_demo_swap_beacons import *

model['backbone'].update(attention=dict(type='adala_mm.CoarseToFineAttention', tile=2, block=4, num_open=8))
