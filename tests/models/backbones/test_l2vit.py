"""L2ViT as a backbone, against its layers written out."""
from __future__ import annotations

import math

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch import nn
from torch.nn import functional as F

from adala_mm.models.backbones import L2ViT
from adala_mm.models.backbones.l2vit import ARCHS, GlobalBlock, LocalBlock
from helpers.references.l2vit import SMALL, naive_global, naive_local, naive_window, project, randomise, step


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
