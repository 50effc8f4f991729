# The flagship's Mask2Former with fewer channels, layers and queries, for tiny backbones and short runs.
from mmengine.config import read_base

with read_base():
    from .mask2former import *

model['neck'].update(embed_dim=192)
model['decode_head'].update(in_channels=[192] * 4, feat_channels=128, out_channels=128, num_queries=40)
model['decode_head']['train_cfg'].update(num_points=4096)
for holder in (model['decode_head'], model['decode_head']['pixel_decoder']):
    holder['positional_encoding'].update(num_feats=64)
pixel = model['decode_head']['pixel_decoder']['encoder']
query = model['decode_head']['transformer_decoder']
pixel.update(num_layers=2)
query.update(num_layers=3)
for layer in (*pixel['layer_cfg'].values(), *query['layer_cfg'].values()):
    layer.update(embed_dims=128)
for ffn in (pixel['layer_cfg']['ffn_cfg'], query['layer_cfg']['ffn_cfg']):
    ffn.update(feedforward_channels=512)
del holder, pixel, query, layer, ffn
