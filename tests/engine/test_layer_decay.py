"""Layer-wise learning-rate decay in a segmentor, which has no `get_layer_depth` of its own."""
from mmengine.optim import build_optim_wrapper
from mmseg.registry import MODELS

from helpers import tiny_vit


def test_rates_rise_with_depth():
    head = dict(type='FCNHead', in_channels=32, channels=32, num_convs=0, concat_input=False, num_classes=3)
    model = MODELS.build(dict(type='EncoderDecoder', backbone=tiny_vit(), decode_head=head))
    wrapper = build_optim_wrapper(model, dict(
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05), paramwise_cfg=dict(layer_decay_rate=0.5),
        constructor='adala_mm.LayerDecayOptimWrapperConstructor'))
    rates = {group['param_name']: group['lr'] for group in wrapper.optimizer.param_groups}
    assert len(rates) == len(list(model.parameters()))
    assert rates['backbone.pos_embed'] == rates['backbone.patch_embed.proj.weight'] == 0.125
    assert rates['backbone.blocks.0.attn.qkv.weight'] == 0.25
    assert rates['backbone.blocks.1.mlp.fc2.bias'] == 0.5
    assert rates['backbone.norm.weight'] == rates['decode_head.conv_seg.weight'] == 1.0
