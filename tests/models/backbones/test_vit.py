"""The softmax ViT against timm, and what the backbone adds to it."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adala_mm.models.attentions import LinearAttention, SoftmaxAttention
from adala_mm.registry import MODELS
from helpers import LINEAR, tiny_vit

SOFTMAX = {'type': 'adala_mm.SoftmaxAttention'}

# family: (arguments of our ViT, those of timm's), on top of the common ones below. The image has 4 x 4 patches.
FAMILIES = {
    'dinov2': ({'patch_size': 14, 'layer_scale': 1e-5},
               {'patch_size': 14, 'init_values': 1e-5}),
    'dinov2_reg4': ({'patch_size': 14, 'layer_scale': 1e-5, 'num_registers': 4, 'no_embed_class': True},
                    {'patch_size': 14, 'init_values': 1e-5, 'reg_tokens': 4, 'no_embed_class': True}),
    'clip': ({'patch_size': 16, 'pre_norm': True, 'act': 'quick_gelu', 'norm_eps': 1e-5},
             {'patch_size': 16, 'pre_norm': True, 'act_layer': 'quick_gelu',
              'norm_layer': partial(nn.LayerNorm, eps=1e-5)}),
    'siglip': ({'patch_size': 16, 'class_token': False},
               {'patch_size': 16, 'class_token': False, 'global_pool': 'map'}),
    'siglip2': ({'patch_size': 16, 'class_token': False, 'act': 'gelu_tanh'},
                {'patch_size': 16, 'class_token': False, 'act_layer': 'gelu_tanh', 'global_pool': 'map'}),
    'augreg': ({'patch_size': 16}, {'patch_size': 16, 'num_classes': 10}),
}
every_family = pytest.mark.parametrize('family', FAMILIES)


def timm_vit(family: str, grid=(4, 4)) -> VisionTransformer:
    options = {'num_classes': 0} | FAMILIES[family][1]
    model = VisionTransformer(img_size=tuple(n * options['patch_size'] for n in grid), embed_dim=48, depth=2,
                              num_heads=3, dynamic_img_size=True, **options)
    for parameter in model.parameters():  # timm starts positions near 0 and LayerScale at 1e-5: nothing would show
        nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1, std=0.2)
    return model.eval()


def pair(family: str, tmp_path, grid=(4, 4), **changes):
    """Our softmax ViT with the weights of timm's, through a file, and timm's."""
    timm_model = timm_vit(family, grid)
    torch.save(timm_model.state_dict(), tmp_path / 'timm.pth')
    options = FAMILIES[family][0]
    model = MODELS.build({'type': 'adala_mm.AdaLAViT', 'img_size': 4 * options['patch_size'], 'embed_dim': 48,
                          'depth': 2, 'num_heads': 3, 'attention': SOFTMAX,
                          'init_cfg': {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'timm.pth')}}
                         | options | changes)
    model.init_weights()
    return model.eval(), timm_model


def vit(**changes):
    """A tiny ViT with weights that make every part of it visible in its outputs."""
    model = MODELS.build(tiny_vit(**changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@every_family
@torch.no_grad()
def test_features_equal_timm(family, tmp_path):
    model, timm_model = pair(family, tmp_path)
    p = model.patch_size
    for h, w in ((4, 4), (5, 3), (2, 8), (7, 7)):
        image = torch.randn(2, 3, h * p, w * p)
        wanted = timm_model.forward_features(image)
        tokens = model.forward_features(image)
        assert tokens.shape == (2, h * w + model.num_prefix, 48)
        assert (tokens - wanted).abs().max() < 1e-5, (h, w)
        # The other outputs are views of the same tokens.
        featmap, = model(image)
        assert (featmap - wanted[:, model.num_prefix:].transpose(1, 2).reshape(2, 48, h, w)).abs().max() < 1e-5


@torch.no_grad()
def test_deit_tiny_weights_equal_timm(shared_data):
    from safetensors.torch import load_file
    from timm import create_model
    path = shared_data / 'weights/deit_tiny_patch16_224.safetensors'
    timm_model = create_model('deit_tiny_patch16_224', dynamic_img_size=True).eval()
    timm_model.load_state_dict(load_file(path))
    model = MODELS.build({'type': 'adala_mm.AdaLAViT', 'embed_dim': 192, 'num_heads': 3, 'attention': SOFTMAX,
                          'init_cfg': {'type': 'Pretrained', 'checkpoint': str(path)}})
    model.init_weights()
    model.eval()
    for size in ((224, 224), (96, 160)):
        image = torch.randn(1, 3, *size)
        wanted = timm_model.forward_features(image)
        assert (model.forward_features(image) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@torch.no_grad()
def test_intermediate_blocks_equal_timm(tmp_path):
    model, timm_model = pair('dinov2_reg4', tmp_path, out_indices=(0, 1))
    image = torch.randn(2, 3, 42, 70)
    wanted = timm_model.get_intermediate_layers(image, n=[0, 1], reshape=True, norm=True)
    for ours, theirs in zip(model(image), wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


@every_family
def test_patch_14_to_16_equals_timm(family, tmp_path):
    other = 30 - FAMILIES[family][0]['patch_size']
    model, timm_model = pair(family, tmp_path, patch_size=other, img_size=4 * other)
    wanted = resample_patch_embed(timm_model.patch_embed.proj.weight.detach(), [other, other])
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), wanted, rtol=0, atol=0)
    torch.testing.assert_close(model.pos_embed, timm_model.pos_embed, rtol=0, atol=0)


@every_family
@pytest.mark.parametrize('grid', [(6, 6), (3, 7)], ids=str)
def test_positions_resized_at_load_equal_timm(family, grid, tmp_path):
    p = FAMILIES[family][0]['patch_size']
    model, timm_model = pair(family, tmp_path, img_size=(grid[0] * p, grid[1] * p))
    prefix = 0 if model.no_embed_class else model.num_prefix
    wanted = resample_abs_pos_embed(timm_model.pos_embed.detach(), list(grid), [4, 4], num_prefix_tokens=prefix)
    torch.testing.assert_close(model.pos_embed.detach(), wanted, rtol=0, atol=0)


@torch.no_grad()
def test_wide_model_equals_timm(tmp_path):
    model, timm_model = pair('augreg', tmp_path, grid=(2, 6), img_size=(32, 96))
    for h, w in ((2, 6), (6, 2), (5, 3)):
        image = torch.randn(1, 3, 16 * h, 16 * w)
        assert (model.forward_features(image) - timm_model.forward_features(image)).abs().max() < 1e-5, (h, w)


def test_random_initialisation_without_a_checkpoint():
    model = MODELS.build(tiny_vit(attention=LINEAR, layer_scale=0.1, num_registers=2))
    model.init_weights()
    weight = model.blocks[1].mlp.fc1.weight
    assert 0.015 < weight.std() < 0.025 and 0.015 < model.pos_embed.std() < 0.025
    assert (model.blocks[1].mlp.fc1.bias == 0).all() and (model.blocks[1].ls2.gamma == 0.1).all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('out_indices', [(-1,), (0, 1), (1, 0), (0, 0, -1, 1), (-2, -2)], ids=str)
@torch.no_grad()
def test_out_indices(out_indices):
    image = torch.randn(2, 3, 24, 40)
    model = vit(out_indices=out_indices)
    outputs = model(image)
    x, hw = model.embed(image)
    by_block = []
    for block in model.blocks:
        x = block(x, hw, model.num_prefix)
        by_block.append(model.norm(x)[:, 1:].transpose(1, 2).reshape(2, 32, 3, 5))
    assert isinstance(outputs, tuple) and len(outputs) == len(out_indices)
    for output, i in zip(outputs, out_indices, strict=True):
        assert output.shape == (2, 32, 3, 5)
        torch.testing.assert_close(output, by_block[i])


@pytest.mark.parametrize('num_registers', [0, 4])
@torch.no_grad()
def test_out_types(num_registers):
    model = vit(num_registers=num_registers)
    image = torch.randn(2, 3, 24, 40)
    tokens = model.forward_features(image)
    wanted = {'raw': tokens, 'cls_token': tokens[:, 0], 'avg_featmap': tokens[:, 1 + num_registers:].mean(1),
                  'featmap': tokens[:, 1 + num_registers:].transpose(1, 2).reshape(2, 32, 3, 5)}
    for out_type, value in wanted.items():
        model.out_type = out_type
        output, = model(image)
        torch.testing.assert_close(output, value)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'out_type': 'cls_token', 'class_token': False}, 'without a class token.*avg_featmap'),
    ({'out_type': 'feature_map'}, "'feature_map'.*featmap, cls_token"),
    ({'out_indices': (0, 2)}, r'\(0, 2\).*no block 2 .*depth=2'),
    ({'out_indices': (-3,)}, 'no block -3 '),
    ({'attention': []}, 'lists 0 layers.*depth=2'),
    ({'attention': [LINEAR]}, 'lists 1 layers.*depth=2'),
    ({'attention': [LINEAR] * 3}, 'lists 3 layers.*depth=2'),
    ({'attention': {'type': 'adala_mm.LinearAtention'}}, 'Did you mean adala_mm.LinearAttention'),
    ({'num_heads': 5}, 'num_heads=5'),
    ({'img_size': (32, 36)}, '32 x 36 .* patches of 8'),
], ids=lambda value: str(value)[:40])
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(tiny_vit(**changes))


@pytest.mark.parametrize('size', [(32, 36), (33, 32), (4, 32)], ids=str)
def test_image_not_divisible_by_the_patch(size):
    with pytest.raises(ValueError, match=f'{size[0]} x {size[1]} .* patches of 8.*instance [0-9]+ x 32'):
        vit()(torch.randn(1, 3, *size))


@pytest.mark.parametrize('bad', [{'type': 'Pretrained'}, {'type': 'Constant', 'val': 0},
                                 {'type': 'Pretrained', 'checkpoint': 'x.pth', 'mapping': 'cpu'}], ids=str)
def test_bad_init_cfg(bad):
    with pytest.raises(ValueError, match='init_cfg must be'):
        MODELS.build(tiny_vit(init_cfg=bad)).init_weights()


@torch.no_grad()
def test_attention_per_block():
    both = vit(attention=[LINEAR | {'feature_map': 'relu'}, SOFTMAX])
    assert isinstance(both.blocks[0].attn, LinearAttention) and both.blocks[0].attn.feature_map == 'relu'
    assert isinstance(both.blocks[1].attn, SoftmaxAttention)
    assert all(isinstance(b.attn, LinearAttention) for b in MODELS.build(tiny_vit(attention=LINEAR)).blocks)
    image = torch.randn(1, 3, 32, 32)
    outputs = [both.forward_features(image)]
    for attention in (SOFTMAX, LINEAR):
        other = vit(attention=attention)
        other.load_state_dict(both.state_dict())
        outputs.append(other.forward_features(image))
    assert outputs[0].isfinite().all()
    assert all((outputs[0] - other).abs().max() > 1e-2 for other in outputs[1:])


@pytest.mark.parametrize('attention', [SOFTMAX, LINEAR], ids=['softmax', 'linear'])
def test_activation_checkpointing_changes_nothing(attention):
    plain = vit(attention=attention, drop_path_rate=0.5, out_indices=(0, 1)).train()
    frugal = vit(attention=attention, drop_path_rate=0.5, out_indices=(0, 1), with_cp=True).train()
    frugal.load_state_dict(plain.state_dict())
    calls = []
    frugal.blocks[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for model in (plain, frugal):
        torch.manual_seed(3)
        image = torch.randn(4, 3, 32, 32, requires_grad=True)
        outputs = model(image)
        sum(out.square().sum() for out in outputs).backward()
        results.append([*outputs, image.grad, *(parameter.grad for parameter in model.parameters())])
    assert len(calls) == 2  # forward and recomputation
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_drop_path_acts_only_in_training():
    model = vit(drop_path_rate=0.5)
    plain = vit()
    plain.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 32, 32).repeat(16, 1, 1, 1)
    assert torch.equal(model.forward_features(image), plain.forward_features(image))
    model.train()
    x, hw = model.embed(image)
    first = model.blocks[0](x, hw, 1)
    torch.testing.assert_close(first, first[:1].expand_as(first))  # the rate rises from 0 in the first block
    last = model.blocks[1](first, hw, 1)
    assert (last - last[:1]).abs().max() > 1e-3


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_layer_depth(prefix):
    model = MODELS.build(tiny_vit(depth=3, num_registers=2, pre_norm=True, layer_scale=0.1))
    depths = {name: model.get_layer_depth(prefix + name, prefix) for name, _ in model.named_parameters()}
    for name, depth in depths.items():
        part = name.split('.')
        wanted = int(part[1]) + 1 if part[0] == 'blocks' else 4 if part[0] == 'norm' else 0
        assert depth == (wanted, 5), name
    assert {depth for depth, _ in depths.values()} == set(range(5))
    if prefix:
        assert model.get_layer_depth('head.fc.weight', prefix) == (4, 5)


def classifier():
    from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
    return MMPRETRAIN_MODELS.build({
        'type': 'ImageClassifier', 'backbone': tiny_vit(out_type='cls_token'),
        'head': {'type': 'LinearClsHead', 'num_classes': 7, 'in_channels': 32, 'loss': {'type': 'CrossEntropyLoss'}}})


def test_layer_wise_lr_decay_of_mmpretrain():
    model = classifier()
    wrapper = build_optim_wrapper(model, {
        'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 1.0, 'weight_decay': 0.05},
        'constructor': 'mmpretrain.LearningRateDecayOptimWrapperConstructor',
        'paramwise_cfg': {'layer_decay_rate': 0.5}})
    lrs = {group['param_name']: group['lr'] for group in wrapper.optimizer.param_groups}
    assert set(lrs) == {name for name, _ in model.named_parameters()}
    order = ['backbone.pos_embed', 'backbone.blocks.0.attn.qkv.weight', 'backbone.blocks.1.mlp.fc2.bias',
             'backbone.norm.weight']
    assert [lrs[name] for name in order] == [0.125, 0.25, 0.5, 1.0]
    assert lrs['backbone.patch_embed.proj.weight'] == lrs['backbone.cls_token'] == 0.125
    assert lrs['head.fc.weight'] == 1.0


@torch.no_grad()
def test_works_in_mmpretrain():
    assert classifier()(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@torch.no_grad()
def test_works_in_mmseg():
    from mmseg.registry import MODELS as MMSEG_MODELS
    model = MMSEG_MODELS.build({
        'type': 'EncoderDecoder', 'backbone': tiny_vit(out_indices=(0, 1)), 'test_cfg': {'mode': 'whole'},
        'decode_head': {'type': 'FCNHead', 'in_channels': [32, 32], 'in_index': [0, 1],
                        'input_transform': 'resize_concat', 'channels': 8, 'num_convs': 1, 'num_classes': 5}})
    assert model.eval()(torch.randn(2, 3, 24, 40)).shape == (2, 5, 3, 5)
