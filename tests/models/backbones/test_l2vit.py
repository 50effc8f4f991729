"""L2ViT: its layers against transcriptions of the formulas, the backbone, and its configs."""
from __future__ import annotations

import copy
import functools
import math

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch import nn
from torch.nn import functional as F

from adala_mm.models.attentions.l2vit import L2ViTAttention, LocalConcentration, WindowAttention
from adala_mm.models.backbones import L2ViT
from adala_mm.models.backbones.l2vit import ARCHS, GlobalBlock, LocalBlock
from adala_mm.preflight import memory
from adala_mm.utils.cli import base_parser, load_config
from helpers import ROOT, tiny_vit
from helpers.detection import CLASSES, draw_split, mmdets
from helpers.layers import without_code
from helpers.pictures import photo
from helpers.preflight import check, red
from helpers.recipes import Recorder
from helpers.recipes import apart as in_folder
from helpers.references.l2vit import naive_global, naive_local, naive_window

DIM, HEADS, WINDOW = 12, 3, 3
GRIDS = [((4, 4), 0), ((3, 5), 1), ((6, 3), 0), ((1, 4), 5), ((7, 6), 3)]
every_grid = pytest.mark.parametrize(('hw', 'num_prefix'), GRIDS, ids=str)
SMALL = dict(embed_dims=(8, 12, 16, 24), depths=(2, 1, 3, 2), num_heads=(1, 2, 2, 3))


def randomise(module, std=0.5):
    """Every parameter and statistic visible in the output, in float64."""
    for name, value in module.double().state_dict().items():
        if name.endswith('running_var'):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.normal_(std=std)
    return module


def tokens(hw, num_prefix, dim=DIM):
    return torch.randn(2, num_prefix + hw[0] * hw[1], dim, dtype=torch.float64, requires_grad=True)


def assert_same(ours, naive, layer, x):
    """Values, and gradients of a random projection with respect to the input and all parameters."""
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-10)
    direction = torch.randn_like(naive)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    wanted = torch.autograd.grad(naive, (x, *parameters), direction, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(ours, (x, *parameters), direction, allow_unused=True, materialize_grads=True)
    for name, a, b in zip(('input', *names), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f'{name}: {text}')


def project(layer, x):
    return x @ layer.proj.weight.T + layer.proj.bias


# --- attentions -------------------------------------------------------------------------------------------------------

@every_grid
@pytest.mark.parametrize('regime', ['below', 'around', 'above'])
def test_global_attention(hw, num_prefix, regime):
    layer, x = randomise(L2ViTAttention(DIM, HEADS)), tokens(hw, num_prefix)
    weights = naive_global(layer, x, 1.0)[1]
    positive = weights[weights > 0].sort().values
    middle = positive[int(0.4 * len(positive)):int(0.6 * len(positive)) + 2]
    gap = middle.diff().argmax()  # at an element itself the last bit would decide whether it is clamped
    around = middle[gap:gap + 2].mean()
    layer.denom_floor = {'below': 2 * positive[-1], 'around': around, 'above': positive[0] / 2}[regime]
    assert ((weights - layer.denom_floor).abs() > 1e-6 * layer.denom_floor).all()
    wanted, _ = naive_global(without_code(layer), x, layer.denom_floor)
    assert_same(layer(x, hw, num_prefix), project(layer, wanted), layer, x)
    clamped = (weights < layer.denom_floor).double().mean()
    assert {'below': clamped == 1, 'around': 0.2 < clamped < 0.8, 'above': clamped < 0.2}[regime]


def test_global_attention_of_ones_is_the_floor():
    layer = randomise(L2ViTAttention(DIM, HEADS))
    with torch.no_grad():
        layer.qkv.weight[2 * DIM:].zero_()
        layer.qkv.bias[2 * DIM:].fill_(1)
        layer.tau['scale'].copy_(torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1))
        for scale in (0.3, 2, 30):
            x = scale * tokens((5, 5), 1)
            weights = naive_global(layer, x, 1.0)[1].view(2, HEADS, -1)
            wanted = torch.tensor([0.5, -1.0, 2.0])[:, None] * torch.clamp(weights / 100, max=1)  # (2, H, N)
            found = layer.attend(x, (5, 5), 1)
            torch.testing.assert_close(found, wanted.transpose(1, 2).repeat_interleave(DIM // HEADS, dim=2))


def test_scale_starts_at_head_width():
    assert torch.equal(L2ViTAttention(64, 4).tau['scale'], torch.full((4, 1, 1), 0.25))


@every_grid
@pytest.mark.parametrize('norm', ['bn', 'ln'])
def test_local_concentration(hw, num_prefix, norm):
    layer, x = randomise(LocalConcentration(DIM, norm)).eval(), tokens(hw, num_prefix)
    out = layer(x, hw, num_prefix)
    assert (out[:, :num_prefix] == 0).all()
    assert_same(out, naive_local(layer, x, hw, num_prefix), layer, x)


def test_local_concentration_in_training():
    x = tokens((4, 5), 0)
    for norm, apart in (('bn', False), ('ln', True)):
        layer = randomise(LocalConcentration(DIM, norm)).train()
        assert torch.allclose(layer(x, (4, 5))[:1], layer(x[:1], (4, 5))) == apart


@every_grid
@pytest.mark.parametrize('mask_padding', [True, False])
def test_window_attention(hw, num_prefix, mask_padding):
    layer = randomise(WindowAttention(DIM, HEADS, window_size=WINDOW, mask_padding=mask_padding))
    x = tokens(hw, num_prefix)
    wanted = naive_window(without_code(layer), x, hw, num_prefix)
    assert_same(layer(x, hw, num_prefix), project(layer, wanted), layer, x)


def test_window_attention_without_bias_pads_with_zeros():
    layer = randomise(WindowAttention(DIM, HEADS, qkv_bias=False, window_size=WINDOW, mask_padding=False))
    x = tokens((4, 5), 0)
    assert_same(layer(x, (4, 5), 0), project(layer, naive_window(layer, x, (4, 5))), layer, x)


def test_window_of_the_whole_grid_is_softmax_attention():
    from adala_mm.models.attentions import SoftmaxAttention
    layer, softmax = WindowAttention(DIM, HEADS, window_size=9).double(), SoftmaxAttention(DIM, HEADS).double()
    softmax.load_state_dict(layer.state_dict())
    for hw, num_prefix in GRIDS:
        x = tokens(hw, num_prefix)
        torch.testing.assert_close(layer(x, hw, num_prefix), softmax(x, hw, num_prefix))


@every_grid
def test_local_concentration_inside_the_attention(hw, num_prefix):
    plain, layer = L2ViTAttention(DIM, HEADS).double(), L2ViTAttention(DIM, HEADS, local_concentration=True).double()
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = tokens(hw, num_prefix)
    assert torch.equal(layer(x, hw, num_prefix), plain(x, hw, num_prefix))  # to begin with
    randomise(layer)
    y = project(layer, naive_global(layer, x, 100.0)[0])
    norm = layer.local['norm']
    local = naive_local(layer.local['lcm'], F.layer_norm(y, (DIM,), norm.weight, norm.bias), hw, num_prefix)
    assert_same(layer(x, hw, num_prefix), y + local, layer, x)


def test_attentions_in_a_plain_vit(pretrained):
    attention = [dict(type='adala_mm.WindowAttention', window_size=3),
                 dict(type='adala_mm.L2ViTAttention', local_concentration=True, denom_floor=10.0)]
    image = torch.randn(2, 3, 40, 24)
    for init_cfg in (None, pretrained):
        model = MODELS.build(tiny_vit(attention=attention, init_cfg=init_cfg))
        model.init_weights()
        assert all((p == 0).all() for p in model.blocks[1].attn.local['lcm'].conv2.parameters())
        assert (model.blocks[1].attn.tau['scale'] == 8 ** -0.5).all()
        assert model(image)[0].isfinite().all()
    state = torch.load(pretrained['checkpoint'])
    assert torch.equal(model.blocks[1].attn.qkv.weight, state['blocks.1.attn.qkv.weight'])


@pytest.mark.parametrize(('build', 'message'), [
    (lambda: L2ViTAttention(DIM, HEADS, denom_floor=0), 'denom_floor=0 must be positive'),
    (lambda: WindowAttention(DIM, HEADS, window_size=0), 'window_size=0'),
    (lambda: LocalConcentration(DIM, 'gn'), "'gn'.*bn, ln"),
    (lambda: L2ViT('huge'), "'huge'.*tiny, small, base.*embed_dims, depths, num_heads"),
    (lambda: L2ViT(dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))), 'four numbers for each of embed_dims'),
    (lambda: L2ViT(dict(SMALL, depths=(2, 2, 2))), 'four numbers'),
    (lambda: L2ViT(dict(SMALL, embed_dims=(7, 12, 16, 24))), 'first width.*even'),
    (lambda: L2ViT(dict(SMALL, num_heads=(1, 5, 2, 3))), 'num_heads=5 does not divide the width 12'),
    (lambda: L2ViT(SMALL, out_indices=(1, 4)), r'\(1, 4\).*stages are 0, 1, 2 and 3'),
    (lambda: L2ViT(SMALL, out_type='cls_token'), "'cls_token'.*featmap, avg_featmap"),
], ids=lambda value: value[:20] if isinstance(value, str) else '')
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(('arch', 'millions'), [('tiny', 28.60), ('small', 50.20), ('base', 88.58)])
def test_parameter_counts(arch, millions):
    with torch.device('meta'):
        model = L2ViT(arch, out_indices=(3,), out_type='avg_featmap')
        head = nn.Linear(ARCHS[arch]['embed_dims'][-1], 1000)
    count = sum(p.numel() for p in (*model.parameters(), *head.parameters()))
    assert abs(count / 1e6 - millions) < 0.01
    assert {d // h for d, h in zip(ARCHS[arch]['embed_dims'], ARCHS[arch]['num_heads'], strict=True)} == {32}


def small(**changes):
    return L2ViT(**dict(arch=SMALL, window_size=3) | changes)


def naive_l2vit(model, image):
    """The whole backbone in eval mode, from the description of the paper's models."""
    def norm(m, x):
        return F.layer_norm(x, x.shape[-1:], m.weight, m.bias, 1e-5)

    def pad(x, size):
        return F.pad(x, (0, (size - x.shape[3] % size) % size, 0, (size - x.shape[2] % size) % size))

    def position(m, x, hw):
        grid = x.transpose(1, 2).reshape(len(x), -1, *hw)
        return x + F.conv2d(grid, m.conv.weight, m.conv.bias, padding=1, groups=x.shape[2]).flatten(2).transpose(1, 2)

    def mlp(m, x):
        return F.linear(F.gelu(F.linear(x, m.fc1.weight, m.fc1.bias)), m.fc2.weight, m.fc2.bias)

    outs, hw = [], None
    for i, (down, blocks) in enumerate(zip(model.downsamples, model.stages, strict=True)):
        if i == 0:
            grid = pad(image, 4)
            for conv, bn in ((down.conv[0], down.conv[1]), (down.conv[3], down.conv[4])):
                grid = F.conv2d(grid, conv.weight, conv.bias, stride=2, padding=1)
                grid = F.batch_norm(grid, bn.running_mean, bn.running_var, bn.weight, bn.bias)
                grid = torch.relu(grid) if conv is down.conv[0] else grid
            x = norm(down.norm, grid.flatten(2).transpose(1, 2))
        else:
            grid = pad(norm(down.norm, x).transpose(1, 2).reshape(len(x), -1, *hw), 2)
            grid = F.conv2d(grid, down.conv.weight, down.conv.bias, stride=2)
            x = grid.flatten(2).transpose(1, 2)
        hw = tuple(grid.shape[2:])
        for j, block in enumerate(blocks):
            if j % 2 == 0:
                x = position(block.cpe1, x, hw)
                x = x + project(block.attn, naive_window(block.attn, norm(block.norm1, x), hw))
                x = position(block.cpe2, x, hw)
            else:
                x = position(block.cpe, x, hw)
                x = x + project(block.attn, naive_global(block.attn, norm(block.norm1, x), 100.0)[0])
                x = x + naive_local(block.lcm, norm(block.norm3, x), hw)
            x = x + mlp(block.mlp, norm(block.norm2, x))
        outs.append(norm(model.norms[str(i)], x).transpose(1, 2).reshape(len(x), -1, *hw))
    return outs


# --- the backbone -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [(32, 32), (50, 38)], ids=str)
@torch.no_grad()
def test_backbone_values(size):
    model = randomise(small(), std=0.3).eval()
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    outs = model(image)
    for out, wanted in zip(outs, naive_l2vit(model, image), strict=True):
        torch.testing.assert_close(out, wanted, rtol=1e-8, atol=1e-8)
        assert out.is_contiguous()
    mean = small(out_indices=(3,), out_type='avg_featmap').double().eval()
    mean.load_state_dict({key: value for key, value in model.state_dict().items() if key in mean.state_dict()})
    torch.testing.assert_close(mean(image)[0], outs[3].mean((2, 3)))


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (3, 1), (2, 2)], ids=str)
@torch.no_grad()
def test_shapes_at_any_size(out_indices):
    model = small(out_indices=out_indices).eval()
    for h, w in ((50, 70), (33, 1), (64, 96)):
        outs = model(torch.randn(2, 3, h, w))
        assert isinstance(outs, tuple) and len(outs) == len(out_indices)
        for i, out in zip(out_indices, outs, strict=True):
            assert out.shape == (2, SMALL['embed_dims'][i], math.ceil(h / 2 ** (i + 2)), math.ceil(w / 2 ** (i + 2)))


def test_block_order_and_initialisation():
    model = small(denom_floor=7.0)
    model.init_weights()
    for blocks, depth in zip(model.stages, SMALL['depths'], strict=True):
        assert [type(block) for block in blocks] == ([LocalBlock, GlobalBlock] * 9)[:depth]
    window, linear = model.stages[2][2].attn, model.stages[2][1]
    assert window.window_size == 3 and not window.mask_padding
    assert linear.attn.denom_floor == 7 and isinstance(linear.lcm.norm, nn.BatchNorm2d)
    assert (linear.attn.tau['scale'] == 8 ** -0.5).all()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert (module.bias == 0).all() and 0.01 < module.weight.std() < 0.03  # small kernels vary


def save(model, path, prefix='backbone.'):
    torch.save(dict(state_dict={prefix + key: value for key, value in model.state_dict().items()}
                    | ({'head.fc.weight': torch.zeros(2)} if prefix else {})), path)
    return dict(type='Pretrained', checkpoint=str(path))


def test_loading(tmp_path):
    classifier = randomise(small(out_indices=(3,), out_type='avg_featmap')).float()
    segmentor = small(init_cfg=save(classifier, tmp_path / 'classifier.pth'))
    segmentor.init_weights()
    theirs, ours = classifier.state_dict(), segmentor.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert set(ours) - set(theirs) == {f'norms.{i}.{key}' for i in range(3) for key in ('weight', 'bias')}
    assert (ours['norms.0.weight'] == 1).all()
    for prefix in ('backbone.', ''):
        back = small(out_indices=(3,), init_cfg=save(segmentor, tmp_path / 'segmentor.pth', prefix))
        back.init_weights()
        assert all(torch.equal(value, theirs[key]) for key, value in back.state_dict().items())


def test_loading_is_strict(tmp_path):
    model = small()

    def load(state, **changes):
        torch.save(state, tmp_path / 'weights.pth')
        small(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth')), **changes).init_weights()

    state = model.state_dict()
    load(state)
    name = 'stages.2.1.attn.tau.scale'
    with pytest.raises(ValueError, match=rf'weights.pth does not fit this L2ViT(.|\n)*Missing(.|\n)*{name}(.|\n)*arch'):
        load({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match='Unexpected(.|\n)*positions'):
        load(state | {'positions': torch.zeros(3)})
    with pytest.raises(ValueError, match='size mismatch for downsamples.0.conv.0.weight'):
        load(state, arch=dict(SMALL, embed_dims=(16, 24, 32, 48)))
    for bad in (dict(type='Constant', val=0), dict(type='Pretrained'),
                dict(type='Pretrained', checkpoint='x.pth', map_location='cpu')):
        with pytest.raises(ValueError, match='init_cfg must be'):
            small(init_cfg=bad).init_weights()
    with pytest.raises(FileNotFoundError, match='no checkpoint at nowhere.pth'):
        small(init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth')).init_weights()


def test_drop_path_acts_only_in_training():
    model, plain = small(drop_path_rate=0.7), small()
    plain.load_state_dict(model.state_dict())
    rates = [block.drop_path.drop_prob for blocks in model.stages for block in blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])
    image = torch.randn(1, 3, 32, 40).repeat(8, 1, 1, 1)
    first, again, wanted = model.eval()(image), model(image), plain.eval()(image)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, wanted, strict=True))
    out, = model.train()(image)[-1:]
    assert (out[1:] != out[:1]).any()


def test_activation_checkpointing_changes_nothing():
    plain, frugal = small(drop_path_rate=0.5).train(), small(drop_path_rate=0.5, with_cp=True).train()
    frugal.load_state_dict(plain.state_dict())
    calls, results = [], []
    frugal.stages[0][1].mlp.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, frugal):
        torch.manual_seed(3)
        image = torch.randn(4, 3, 36, 32, requires_grad=True)
        outs = model(image)
        sum(out.square().sum() for out in outs).backward()
        # Statistics of BatchNorm too: the recomputation is no second batch.
        results.append([*outs, image.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert len(calls) == 2 and len(list(plain.buffers())) > 10
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert all(m.momentum == 0.1 for m in frugal.modules() if isinstance(m, nn.BatchNorm2d))


def test_bf16_autocast():
    model = small().eval()
    image = torch.randn(2, 3, 50, 70)
    wanted = model(image)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs, big = model(image), model(1e4 * image)
    sum(out.float().square().mean() for out in (*outs, *big)).backward()
    assert all(out.isfinite().all() for out in big)
    assert all((a.float() - b).abs().max() < 0.05 * b.abs().max() for a, b in zip(outs, wanted, strict=True))
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_layer_depth(prefix):
    model = small()
    names = [name for name, _ in model.named_parameters()]
    depths = {name: model.get_layer_depth(prefix + name, prefix) for name in names}
    assert {total for _, total in depths.values()} == {10} and {d for d, _ in depths.values()} == set(range(10))
    order = ['downsamples.0.conv.0.weight', 'stages.0.0.norm1.weight', 'stages.0.1.attn.tau.scale',
             'downsamples.1.norm.weight', 'stages.1.0.mlp.fc1.bias', 'downsamples.2.conv.bias',
             'stages.2.2.cpe1.conv.weight', 'stages.3.1.lcm.conv1.weight', 'norms.0.weight']
    assert [depths[name][0] for name in order] == [0, 1, 2, 3, 3, 4, 6, 8, 9]
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (9, 10)


def step(model, data):
    """One step of training: the losses, and the parameters that did not move."""
    model.init_weights()
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = model.train_step(data, OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-2)))
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    # BatchNorm takes off what these biases add: nothing but the rounding of their gradients can move them.
    return losses, still - {f'backbone.downsamples.0.conv.{i}.bias' for i in (0, 3)}


def test_trains_in_mmpretrain():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(
            type='ImageClassifier',
            backbone=dict(type='adala_mm.L2ViT', arch=SMALL, out_indices=(3,), out_type='avg_featmap',
                          drop_path_rate=0.1, denom_floor=1.0),
            head=dict(type='LinearClsHead', num_classes=5, in_channels=24)))
        data = dict(inputs=torch.randint(256, (4, 3, 45, 64)),
                    data_samples=[DataSample().set_gt_label(i) for i in range(4)])
        losses, still = step(model, data)
    assert losses['loss'].isfinite() and not still


def test_trains_in_mmseg():
    head = dict(in_channels=list(SMALL['embed_dims']), in_index=[0, 1, 2, 3], channels=16, num_classes=5,
                norm_cfg=dict(type='BN'), loss_decode=dict(type='CrossEntropyLoss'))
    samples = []
    for _ in range(2):
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=torch.randint(5, (1, 64, 96)))))
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(dict(
            type='EncoderDecoder', data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 96)),
            backbone=dict(type='adala_mm.L2ViT', arch=SMALL, window_size=3, denom_floor=1.0),
            decode_head=dict(head, type='UPerHead', pool_scales=(1, 2)), test_cfg=dict(mode='whole')))
        # Of two equal images BatchNorm would leave zeros and rounding, where ReLU has its kink.
        images = [torch.randint(256, (3, 64, 96)) for _ in range(2)]
        losses, still = step(model, dict(inputs=images, data_samples=samples))
        assert model.eval()(torch.randn(1, 3, 50, 70)).shape == (1, 5, 13, 18)
    assert losses['loss'].isfinite() and not still


# --- configs/l2vit ---

NAMES = [f'{kind}_l2vit{size}_{data}' for kind, data in (('cls', 'in1k'), ('upernet', 'ade20k'),
                                                        ('mask2former', 'ade20k')) for size in 'tsb']
DETECTORS = [f'maskrcnn_l2vit{size}_{length}x_coco' for length in (1, 3) for size in 'tsb']
IN22K = ['cls_l2vitb_in22k', 'cls_l2vitb_384_in1k']
SIZES = {'t': 'tiny', 's': 'small', 'b': 'base'}
every_config = pytest.mark.parametrize('name', NAMES)


@functools.cache
def parsed(name):
    return Config.fromfile(ROOT / 'configs/l2vit' / f'{name}.py')


def config(name):
    return copy.deepcopy(parsed(name))


@functools.cache
def model_of(name):
    """At full size, without memory: parameters have shapes only."""
    cfg = config(name)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        return MODELS.build(cfg.model)


def test_every_config_is_listed():
    names = NAMES + DETECTORS + IN22K
    assert {path.stem for path in (ROOT / 'configs/l2vit').glob('*.py')} == set(names)
    before = {name: parsed(name).to_dict() for name in names}
    for name in reversed(names):  # they edit dicts of shared base files
        assert Config.fromfile(ROOT / 'configs/l2vit' / f'{name}.py').to_dict() == before[name], name


@pytest.mark.parametrize('name', ['cls_l2vits_in1k', 'upernet_l2vitb_ade20k', 'mask2former_l2vitb_ade20k'])
def test_dump_and_reload(name, tmp_path):
    config(name).dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == parsed(name).to_dict()


@every_config
def test_sizes_differ_in_the_model_only(name):
    kind, size = name.split('_')[0], name.split('_')[1][-1]
    cfg, twin = config(name).to_dict(), config(name.replace(f'l2vit{size}', 'l2vitt')).to_dict()
    backbone = cfg['model']['backbone']
    assert (backbone['type'], backbone['arch']) == ('adala_mm.L2ViT', SIZES[size])
    published = 0.3 if kind != 'cls' or size == 'b' else {'t': 0.1, 's': 0.2}[size]
    assert backbone['drop_path_rate'] == published
    if kind == 'cls':
        assert 'init_cfg' not in backbone
    else:
        assert_starts_from(name, f'cls_l2vit{size}_in1k')
    del cfg['model'], twin['model']
    assert cfg == twin


def assert_starts_from(name, classifier):
    """The classifier's last file is named, and fits: only output norms differ."""
    epochs = parsed(classifier).train_cfg.max_epochs
    assert parsed(name).model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint=f'work_dirs/{classifier}/epoch_{epochs}.pth')
    ours, theirs = (model_of(config).backbone.state_dict() for config in (name, classifier))
    assert set(theirs) <= set(ours)
    assert all(key.startswith('norms.') for key in set(ours) - set(theirs))
    assert all(ours[key].shape == value.shape for key, value in theirs.items())


@every_config
def test_features_fit_the_head(name):
    cfg, model = config(name), model_of(name).eval()
    if cfg.default_scope == 'mmpretrain':
        assert model(torch.empty(1, 3, 224, 224, device='meta'), mode='tensor').shape == (1, 1000)
        assert model.head.fc.in_features == ARCHS[cfg.model.backbone.arch]['embed_dims'][-1]
        return
    images = torch.empty(1, 3, 512, 512, device='meta')
    features = model.extract_feat(images)
    assert [f.shape[1] for f in features] == cfg.model.decode_head.in_channels
    assert [512 // f.shape[2] for f in features] == [4, 8, 16, 32]
    if 'auxiliary_head' in cfg.model:
        assert features[cfg.model.auxiliary_head.in_index].shape[1] == cfg.model.auxiliary_head.in_channels
        assert model(images, mode='tensor').shape == (1, 150, 128, 128)
    else:
        assert cfg.model.decode_head.strides == [4, 8, 16, 32] and 'neck' not in cfg.model
        assert cfg.model.decode_head.loss_cls.class_weight == [1.0] * 150 + [0.1]


@every_config
def test_schedule_and_optimizer(name, monkeypatch):
    monkeypatch.setattr('mmengine.optim.optimizer.default_constructor.print_log', lambda *args, **kwargs: None)
    cfg, model, kind = config(name), model_of(name), name.split('_')[0]
    lr, decay = dict(cls=(4e-3, 0.05), upernet=(6e-5, 0.01), mask2former=(1e-4, 0.05))[kind]
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=lr, weight_decay=decay)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    groups = {id(p): group for group in wrapper.optimizer.param_groups for p in group['params']}
    assert {id(p) for p in model.parameters()} == set(groups)
    norms = {f'{prefix}.{key}' for prefix, module in model.named_modules() for key, _ in module.named_parameters()
             if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))}
    for key, p in model.named_parameters():
        slow = kind == 'mask2former' and key.startswith('backbone.')
        assert groups[id(p)]['lr'] == pytest.approx(0.1 * lr if slow else lr)
        if kind == 'cls':
            spared = key in norms or key.endswith('.bias')
            assert groups[id(p)].get('weight_decay', decay) == (0 if spared else decay), key
    if kind == 'cls':
        # 8 GPUs; the hook that averages the weights counts iterations, not steps.
        assert 8 * cfg.train_dataloader.batch_size * cfg.optim_wrapper.accumulative_counts == 4096
        assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size
        assert cfg.custom_hooks[0].interval == cfg.optim_wrapper.accumulative_counts
        assert cfg.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=300)
    elif kind == 'upernet':
        assert cfg.train_cfg == dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
        assert 8 * cfg.train_dataloader.batch_size == 16 == cfg.auto_scale_lr.base_batch_size
        assert cfg.train_dataloader.sampler.type == 'InfiniteSampler' and cfg.sync_bn == 'torch'
        hook = cfg.default_hooks.checkpoint
        assert not hook.by_epoch and not cfg.log_processor.by_epoch and 160000 % hook.interval == 0
    else:
        assert cfg.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=20)
        assert 8 * cfg.train_dataloader.batch_size == 64


def rates(cfg, iterations, epoch_length):
    """Learning rates of a run, iteration by iteration."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = []
    for options in cfg.param_scheduler:
        options = dict(options)
        kind = PARAM_SCHEDULERS.get(options.pop('type'))
        if options.pop('convert_to_iter_based', False):
            schedulers.append(kind.build_iter_from_epoch(optimizer=optimizer, epoch_length=epoch_length, **options))
        else:
            schedulers.append(kind(optimizer=optimizer, **options))
    found = []
    for _ in range(iterations):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return found


def test_learning_rates():
    found = rates(config('cls_l2vitt_in1k'), 601, epoch_length=2)
    assert found[0] == pytest.approx(4e-6) and found[40] == pytest.approx(4e-3) == max(found)
    assert found[320] == pytest.approx((4e-3 + 1e-6) / 2, rel=1e-2) and found[600] == pytest.approx(1e-6, abs=1e-7)
    found = rates(config('upernet_l2vitt_ade20k'), 3100, epoch_length=1)
    assert found[0] == pytest.approx(6e-11) and found[750] == pytest.approx(3e-5, rel=1e-2)
    assert found[1500] == pytest.approx(6e-5, rel=1e-3)
    assert found[1500] - found[3085] == pytest.approx(6e-5 / 100, rel=1e-2)  # a hundredth of what is left


def test_averaging_hook_builds():
    cfg = config('cls_l2vitt_in1k')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        hook = HOOKS.build({key: value for key, value in cfg.custom_hooks[0].items() if key != 'priority'})
        average = MODELS.build(dict(hook.ema_cfg), default_args=dict(model=nn.BatchNorm1d(3)))
    assert average.interval == 4 and average.momentum == 1e-4 and average.update_buffers


@every_config
def test_datasets_pipelines_and_metrics_build(name):
    cfg = config(name)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            options = loader.dataset.to_dict()
            assert len(Compose(copy.deepcopy(options['pipeline'])).transforms) == len(options['pipeline'])
            dataset = DATASETS.build(dict(options, lazy_init=True))
            head = cfg.model.get('decode_head') or cfg.model.head
            assert len(dataset.metainfo['classes']) == head.num_classes
        METRICS.build(cfg.val_evaluator.to_dict())
        mean, std = (cfg.model.data_preprocessor[key] for key in ('mean', 'std'))
    assert (mean, std) == ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    if cfg.default_scope == 'mmseg':
        assert cfg.model.data_preprocessor.size == (512, 512) == tuple(cfg.crop_size)


def test_classification_pipelines_and_batch(tmp_path):
    """Random augmentation, mixup and label smoothing meet in one step of a small twin."""
    photo = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'photo.jpg'), photo)
    cfg = config('cls_l2vitt_in1k')
    cfg.model.backbone.arch = SMALL
    cfg.model.head.in_channels = 24
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        batches = {}
        for loader in ('train_dataloader', 'val_dataloader'):
            pipeline = Compose(copy.deepcopy(cfg[loader].dataset.to_dict()['pipeline']))
            items = [pipeline(dict(img_path=str(tmp_path / 'photo.jpg'), gt_label=i)) for i in (1, 2)]
            assert all(item['inputs'].shape == (3, 224, 224) for item in items)
            batches[loader] = dict(inputs=torch.stack([item['inputs'] for item in items]),
                                   data_samples=[item['data_samples'] for item in items])
        model = MODELS.build(cfg.model)
        losses, _ = step(model, batches['train_dataloader'])
        with torch.no_grad():
            results = model.eval().val_step(batches['val_dataloader'])
    assert losses['loss'].isfinite() and results[0].pred_score.shape == (1000,)
    assert abs(model.head.fc.bias).max() <= 0.011  # zero before its first step
    assert model.head.init_cfg['std'] == 0.02


# --- Mask R-CNN, and ImageNet-22K

@pytest.mark.parametrize('name', DETECTORS)
def test_detectors_have_the_published_recipe(name, monkeypatch):
    """That of the authors' configs: drop path, optimizer, steps; mmdet's model but for the backbone."""
    monkeypatch.setattr('mmengine.optim.optimizer.default_constructor.print_log', lambda *args, **kwargs: None)
    _, vit, length, _ = name.split('_')
    size, cfg, model = vit[-1], config(name), model_of(name)
    assert_starts_from(name, f'cls_{vit}_in1k')
    assert cfg.model.backbone.arch == SIZES[size]
    assert cfg.model.backbone.drop_path_rate == {'1x': dict(t=0.1, s=0.1, b=0.2),
                                                 '3x': dict(t=0.2, s=0.2, b=0.3)}[length][size]
    epochs, steps = {'1x': (12, [8, 11]), '3x': (36, [27, 33])}[length]
    warmup, multi_step = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.001, 500, False)
    assert (multi_step.milestones, multi_step.end, multi_step.gamma) == (steps, epochs, 0.1)
    assert cfg.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=epochs)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    assert {(group['lr'], group['weight_decay']) for group in groups} == {(1e-4, 0.05)}
    assert 'clip_grad' not in cfg.optim_wrapper and cfg.sync_bn == 'torch'
    assert 8 * cfg.train_dataloader.batch_size == 16 == cfg.auto_scale_lr.base_batch_size
    maps = model.neck(model.backbone.eval()(torch.empty(1, 3, 128, 96, device='meta')))
    assert [tuple(f.shape[1:]) for f in maps] == [(256, 128 // s, math.ceil(96 / s)) for s in (4, 8, 16, 32, 64)]
    theirs = mmdets('_base_/models/mask-rcnn_r50_fpn.py').model
    for part in (cfg.model, theirs):
        part.pop('backbone')
        part.neck.pop('in_channels')
    assert cfg.model == theirs
    flip, mosaic = cfg.train_dataloader.dataset.pipeline[2:4]
    whole, cropped = mosaic.transforms
    assert flip.type == 'RandomFlip' and [scale[1] for scale in whole[0].scales] == [1333] * 11
    assert cropped[0].scales == [(400, 1333), (500, 1333), (600, 1333)] and cropped[1].crop_size == (384, 600)
    assert cfg.train_dataloader.dataset.pipeline[1].with_mask and cfg.val_evaluator.metric == ['bbox', 'segm']


def cut(name, **places):
    """The config as a file, for a tiny network from random weights on a few small pictures in ``places``."""
    cfg = config(name)
    cfg.model.backbone.update(arch=SMALL, init_cfg=None)
    cfg.train_cfg.max_epochs, cfg.param_scheduler = 1, None
    for loader, batch in (('train_dataloader', 2), ('val_dataloader', 1), ('test_dataloader', 1)):
        cfg[loader].update(num_workers=0, persistent_workers=False, batch_size=batch)
        cfg[loader].dataset.update(places)
    return cfg


@pytest.fixture
def no_estimate(monkeypatch):
    """Of memory, which takes a second in each of many runs, and is tested elsewhere."""
    monkeypatch.setattr(memory, 'estimate', lambda plan: lambda batch, height, width: 0)
    monkeypatch.setattr(memory, 'head_line', lambda plan: lambda pixels: 0)


def check_and_train(cfg, place):
    cfg.dump(place / 'cut.py')
    assert not red(check(place / 'cut.py', '--data-root', place))
    cfg = load_config(base_parser('').parse_args([str(place / 'cut.py'), '--data-root', str(place)]))
    cfg.experiment_name = cfg.visualizer.name = place.name
    run, record = Runner.from_cfg(cfg), Recorder()
    run.register_hook(record)
    run.train()
    assert len(record.losses) == 2 and all(0 < loss < 1e3 for loss in record.losses)
    key = 'backbone.stages.0.0.attn.qkv.weight'
    assert not torch.equal(run.model.state_dict()[key], record.state[key])


@pytest.mark.parametrize('name', ['maskrcnn_l2vitt_1x_coco'])
def test_a_detector_is_checked_and_trained(name, tmp_path, no_estimate):
    draw_split(tmp_path / 'coco', 'train2017', count=4, seed=0)
    draw_split(tmp_path / 'coco', 'val2017', count=1, seed=1)
    cfg = cut(name, metainfo=dict(classes=CLASSES))
    heads, narrow = cfg.model.roi_head, 32
    cfg.model.neck.update(in_channels=list(SMALL['embed_dims']), out_channels=narrow)
    cfg.model.rpn_head.update(in_channels=narrow, feat_channels=narrow)
    heads.bbox_head.update(in_channels=narrow, fc_out_channels=narrow)
    heads.mask_head.update(in_channels=narrow, conv_out_channels=narrow)
    for part in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
        part.out_channels = narrow
    heads.bbox_head.num_classes = heads.mask_head.num_classes = len(CLASSES)
    cfg.train_dataloader.dataset.filter_cfg.min_size = 4
    cfg.train_dataloader.dataset.pipeline[3] = dict(type='RandomResize', scale=(96, 96), ratio_range=(0.8, 1))
    for loader in ('val_dataloader', 'test_dataloader'):
        cfg[loader].dataset.pipeline[1].scale = (96, 96)
    with in_folder(tmp_path):
        check_and_train(cfg, tmp_path)


@pytest.mark.parametrize('name', IN22K)
def test_imagenet_22k_is_checked_and_trained(name, tmp_path, no_estimate):
    pretraining = name == 'cls_l2vitb_in22k'
    cfg, classes = cut(name), 5
    for split in ('imagenet22k', 'imagenet22k_val') if pretraining else ('imagenet/train', 'imagenet/val'):
        for i in range(classes):  # and one left over in an epoch of batches of two
            photo(tmp_path / split / f'n{i:08d}' / f'{i}.JPEG')
    cfg.model.head.update(in_channels=24, num_classes=classes)
    cfg.model.data_preprocessor.num_classes = classes
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if not pretraining:
            cfg[loader].dataset.metainfo = dict(classes=[f'kind {i}' for i in range(classes)])
        cfg[loader].dataset.pipeline[1].scale = 64 if cfg[loader].dataset.pipeline[1].type != 'Resize' else (64, 64)
    with in_folder(tmp_path):
        check_and_train(cfg, tmp_path)


def test_recipe_of_imagenet_22k():
    """The authors' commands: batch 1024, 90 epochs, then 30 at 384 px with windows of 12."""
    first, second = (config(name) for name in IN22K)
    assert_starts_from(IN22K[1], IN22K[0])
    assert model_of(IN22K[0]).head.fc.out_features == 21841 == first.model.data_preprocessor.num_classes
    for cfg, counts, epochs, side in ((first, 1, 90, 224), (second, 2, 30, 384)):
        assert 8 * cfg.train_dataloader.batch_size * counts == 1024
        assert cfg.optim_wrapper.get('accumulative_counts', 1) == counts
        assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size
        assert cfg.train_cfg.max_epochs == epochs == cfg.param_scheduler[-1].end
        assert cfg.model.backbone.arch == 'base' and cfg.model.backbone.drop_path_rate == 0.2
        assert cfg.train_dataloader.dataset.pipeline[1].scale == side
    assert (first.optim_wrapper.optimizer, second.optim_wrapper.optimizer) == (
        dict(type='AdamW', lr=1e-3, weight_decay=0.05), dict(type='AdamW', lr=4e-5, weight_decay=1e-8))
    assert second.model.backbone.window_size == 12 and 'custom_hooks' not in first
    assert second.custom_hooks[0].interval == 2
    for cfg, start, top, end in ((first, 1e-6, 1e-3, 1e-5), (second, 4e-8, 4e-5, 4e-7)):
        found = rates(cfg, 2 * cfg.train_cfg.max_epochs + 1, epoch_length=2)
        assert (found[0], found[10], found[-1]) == pytest.approx((start, top, end), rel=0.1)  # close to its end
