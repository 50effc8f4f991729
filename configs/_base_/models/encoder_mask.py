# Encoder-only mask head (EoMT; Kerssies et al. 2025): 100 queries join the last four blocks of the ViT, whose map is
# doubled twice and multiplied by them. Matching and losses are Mask2Former's. Queries see the whole image in training
# too: masked attention, which EoMT anneals away, is left out.
from mmengine.config import read_base

with read_base():
    from .mask2former import *

queries = dict(type='adala_mm.QueryViT', num_queries=100, query_blocks=4)
model.pop('neck')
model['data_preprocessor'].update(test_cfg=dict(size_divisor=16))
head = model.pop('decode_head')
matched = {key: head[key] for key in ('loss_cls', 'loss_mask', 'loss_dice', 'train_cfg')}
model.update(decode_head=dict(type='adala_mm.EncoderMaskHead', in_channels=1024, num_queries=100, **matched))
del head, matched
