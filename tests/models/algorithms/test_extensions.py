"""What goes beyond the paper: dwconv, retained softmax, loss terms, layers, hidden patches, attention loss."""
from __future__ import annotations

import copy
import json
import math
import runpy
import sys

import cv2
import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch.nn import functional as F

from adala_mm import align, linearize
from adala_mm.models.algorithms.feature_alignment import hide_patches, layer_tokens, random_patches
from adala_mm.models.algorithms.feature_terms import TERMS, feature_terms, term_weights
from adala_mm.models.attentions import Attention, HedgehogAttention, LinearAttention
from adala_mm.registry import MODELS
from helpers import LINEAR, ROOT, tiny_vit
from helpers.processes import put_back

SOFTMAX = dict(type='adala_mm.SoftmaxAttention')
DWCONV = LINEAR | dict(dwconv=3)
KINDS = [LinearAttention, HedgehogAttention]  # of attention that may have one
ADAMW = dict(optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.5))


def stage1(pretrained: dict, attention: dict | list[dict] = LINEAR, **options) -> torch.nn.Module:
    model = MODELS.build(dict(type='adala_mm.AttentionAlignment',
                              backbone=tiny_vit(attention=attention, init_cfg=pretrained), **options))
    model.init_weights()
    return model


def stage2(pretrained: dict, vit: dict | None = None, student: dict | None = None, init: bool = True,
           **options) -> torch.nn.Module:
    vit = vit or {}
    model = MODELS.build(dict(
        type='adala_mm.FeatureAlignment', teacher=tiny_vit(**vit, init_cfg=pretrained), **options,
        backbone=tiny_vit(**{'attention': LINEAR, 'init_cfg': pretrained} | vit | (student or {}))))
    if init:
        model.init_weights()
    return model


def images(count: int = 3, side: int | tuple[int, int] = 32) -> torch.Tensor:
    return torch.randn(count, 3, *(side if isinstance(side, tuple) else (side, side)))


def step(model: torch.nn.Module) -> dict:
    """One step of training; what learns must change, and nothing else."""
    before = {key: value.clone() for key, value in model.named_parameters()}
    wrapper = build_optim_wrapper(model, ADAMW)
    model.train().loss(images())['loss'].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name  # DDP waits for all of them
    log = model.train_step(dict(inputs=images()), wrapper)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert all(math.isfinite(value) for value in log.values())
    return log


# --- depth-wise convolution on v -------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dwconv', [1, 3, 5])
def test_dwconv_starts_as_the_plain_layer_bit_for_bit(kind, dwconv):
    layer = kind(32, 4, dwconv=dwconv)
    assert sum(p.numel() for p in layer.dwconv.parameters()) == 32 * dwconv ** 2 + 32
    plain = kind(32, 4)
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if 'dwconv' not in key})
    x = torch.randn(2, 1 + 12, 32)
    assert torch.equal(layer(x, (3, 4), 1), plain(x, (3, 4), 1))
    q, k, v = layer.project(x)
    assert torch.equal(layer.mix(q, k, v, (3, 4), 1), plain.mix(q, k, v, (3, 4), 1))


@pytest.mark.parametrize('num_prefix', [0, 1, 5])
@pytest.mark.parametrize('kind', KINDS)
def test_dwconv_against_its_formula(kind, num_prefix):
    """Values and gradients, against loops in float64."""
    h, w, dim, heads, size = 3, 5, 16, 4, 3
    layer = kind(dim, heads, dwconv=size)
    for parameter in layer.dwconv.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, num_prefix + h * w, dim, requires_grad=True)
    got = layer.attend(x, (h, w), num_prefix)

    reference = copy.deepcopy(layer).double()
    y = x.detach().double().requires_grad_()
    q, k, v = reference.project(y)
    features = [F.elu(q) + 1, F.elu(k) + 1]
    if kind is HedgehogAttention:  # its maps are the identity before they learn
        features = [torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1) for y in (q, k)]
    scores = features[0] @ features[1].transpose(-2, -1)
    mixed = (scores / scores.sum(-1, keepdim=True)) @ v
    mixed = mixed.transpose(1, 2).flatten(2)
    values = v.transpose(1, 2).flatten(2)[:, num_prefix:].unflatten(1, (h, w))
    rows = []
    for i in range(h):
        for j in range(w):
            total = reference.dwconv.bias.expand(2, dim)
            for a in range(size):
                for b in range(size):
                    y0, x0 = i + a - size // 2, j + b - size // 2
                    if 0 <= y0 < h and 0 <= x0 < w:
                        total = total + reference.dwconv.weight[:, 0, a, b] * values[:, y0, x0]
            rows.append(total)
    wanted = mixed + F.pad(torch.stack(rows, dim=1), (0, 0, num_prefix, 0))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    # Class and register tokens get none.
    assert torch.equal(got[:, :num_prefix], without_conv(layer).attend(x, (h, w), num_prefix)[:, :num_prefix])

    weight = torch.randn_like(got)
    learners = [x, layer.qkv.weight, *layer.dwconv.parameters()]
    theirs = [y, reference.qkv.weight, *reference.dwconv.parameters()]
    for a, b in zip(torch.autograd.grad((got * weight).sum(), learners),
                    torch.autograd.grad((wanted * weight).sum(), theirs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def without_conv(layer: Attention) -> Attention:
    layer = copy.deepcopy(layer)
    layer.dwconv = None
    return layer


def test_both_ways_through_the_layer_agree():
    layer = LinearAttention(32, 4, dwconv=3)
    torch.nn.init.normal_(layer.dwconv.weight)
    x = torch.randn(2, 13, 32)
    slow = super(LinearAttention, layer).attend(x, (3, 4), 1)  # by `mix`, as adapters with norms of q and k go
    torch.testing.assert_close(layer.attend(x, (3, 4), 1), slow)


@pytest.mark.parametrize('kind', KINDS)
def test_only_dwconv_knows_places(kind):
    assert kind(32, 4, dwconv=3).positional and not kind(32, 4).positional
    assert not kind.positional


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', [0, 2, -1])
def test_bad_dwconv_raises(kind, size):
    with pytest.raises(ValueError, match=f'kernel_size={size} must be odd and positive'):
        kind(32, 4, dwconv=size)


def test_dwconv_learns_in_both_stages_and_its_checkpoint_goes_on(pretrained, tmp_path):
    model = stage1(pretrained, DWCONV)
    step(model)  # which says that all of it learns
    learners = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert learners == {f'blocks.{i}.attn.{part}.{kind}' for i in (0, 1) for part in ('qkv', 'dwconv')
                        for kind in ('weight', 'bias')}
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'stage1.pth')
    student = dict(attention=DWCONV, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'stage1.pth')))
    second = stage2(pretrained, student=student)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in second.state_dict().items())
    assert any(key.endswith('dwconv.weight') for key in second.state_dict())
    assert second.backbone.blocks[0].attn.dwconv.weight.abs().max() > 0
    step(second)
    # A student without it does not take that checkpoint in silence.
    with pytest.raises(ValueError, match=r'unexpected +blocks\.\*\.attn\.dwconv\.weight'):
        stage2(pretrained, student=student | dict(attention=LINEAR))


@pytest.mark.parametrize('qk_norm', [False, True])
def test_dwconv_in_a_linearized_timm_vit(qk_norm):
    options = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0, qk_norm=qk_norm)
    teacher = timm.models.vision_transformer.VisionTransformer(**options, dynamic_img_size=True).eval()
    plain, model = linearize(teacher, 'linear'), linearize(teacher, dict(type='linear', dwconv=3))
    x = images(2, (32, 48))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-6, atol=1e-6)
    align(model, teacher, [x], stage=1, steps=2, lr=1e-2)
    assert all(block.attn.dwconv.weight.abs().max() > 0 for block in model.blocks)
    align(model, teacher, [x], stage=2, steps=1, lr=1e-2)
    state = model.state_dict()
    assert 'blocks.0.attn.dwconv.weight' in state and set(teacher.state_dict()) < set(state)


# --- retained softmax blocks -----------------------------------------------------------------------------------------


def test_retained_softmax_blocks(pretrained):
    kept = [SOFTMAX, LINEAR]
    for model in (stage1(pretrained, kept), stage2(pretrained, student=dict(attention=kept))):
        assert model.backbone.num_softmax_blocks == 1
        step(model)
    full = stage2(pretrained, student=dict(attention=SOFTMAX))
    assert full.loss(images())['rel_error'] < 1e-5


@pytest.fixture
def rank_blocks(monkeypatch) -> dict:
    """tools/analysis_tools/rank_blocks.py; what it leaves in the process is put back."""
    put_back(monkeypatch)
    return runpy.run_path(str(ROOT / 'tools/analysis_tools/rank_blocks.py'))


def test_ranking_against_networks_with_these_blocks(sharp_pretrained, rank_blocks):
    model = stage1(sharp_pretrained)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.02 * torch.randn_like(parameter)  # as after a short stage 1
    batches = [images(3), images(2)]
    ranking = rank_blocks['Ranking'](model, batches)
    before = copy.deepcopy(model.backbone)

    def reference(kept: set[int]) -> float:
        vit = copy.deepcopy(before).eval()
        for i in kept:
            vit.blocks[i].attn = model.frozen['attentions'][i]
        with torch.no_grad():
            pairs = [(vit.forward_features(x), model.teacher_features(x)) for x in batches]
        got, wanted = (torch.cat(x) for x in zip(*pairs, strict=True))
        return ((got - wanted).norm() / wanted.norm()).item()

    errors = {kept: ranking.feature_error(kept) for kept in [(), (0,), (1,), (0, 1)]}
    assert errors == {kept: pytest.approx(reference(set(kept)), rel=1e-3, abs=1e-6) for kept in errors}
    assert errors[()] > 0.01 and errors[0, 1] < 1e-5
    assert all(block.attn is ranking.linear[i] for i, block in enumerate(model.backbone.blocks))  # put back
    best = min((0, 1), key=lambda i: errors[i,])
    assert ranking.greedy(5) == [(best, errors[best,]), (1 - best, pytest.approx(0, abs=1e-5))]
    x = torch.cat([batches[0], batches[0]])
    model.eval().loss(x)
    assert rank_blocks['Ranking'](model, [batches[0]]).block_errors() == {
        i: pytest.approx(model.block_errors[i].item(), rel=1e-4) for i in (0, 1)}


def test_rank_blocks_from_the_command_line(sharp_pretrained, rank_blocks, tmp_path, monkeypatch, capsys):
    (tmp_path / 'photos/more').mkdir(parents=True)
    for i in range(12):
        photo = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f'photos/{"more/" * (i % 2)}{i}.png'), photo)
    config = Config.fromfile(ROOT / 'configs/real/stage1_deitt_caltech.py')
    config.model.update(backbone=tiny_vit(attention=LINEAR, init_cfg=sharp_pretrained), head=None)
    config.dump(str(tmp_path / 'stage1_tiny.py'))

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, 'argv', ['rank_blocks.py', str(tmp_path / 'stage1_tiny.py'), '--images',
                                          str(tmp_path / 'photos'), '--steps', '3', '--batch-size', '4', *words])
        rank_blocks['main']()
        return capsys.readouterr().out

    out = run('--measure', '8', '--keep', '1', '--json', str(tmp_path / 'blocks.json'))
    found = json.loads((tmp_path / 'blocks.json').read_text())
    assert found['images'] == 8 and [row['block'] for row in found['blocks']] == [0, 1]
    (kept,) = found['kept']
    assert kept['feature_error'] == min(row['feature_error_kept'] for row in found['blocks'])
    assert f'attention=[softmax if i in ({kept["block"]},) else linear for i in range(2)]' in out
    assert '(0 softmax / 2 linear blocks)' in out
    # Of a finished stage 1 nothing is trained: its errors are those of the weights in the file.
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config.model)
    model.init_weights()
    torch.nn.init.zeros_(model.backbone.blocks[0].attn.qkv.weight)
    torch.nn.init.zeros_(model.backbone.blocks[0].attn.qkv.bias)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'stage1.pth')
    out = run('--measure', '12', '--keep', '1', '--checkpoint', str(tmp_path / 'stage1.pth'), '--json',
              str(tmp_path / 'still.json'))  # no image is left for training
    still = json.loads((tmp_path / 'still.json').read_text())
    bias = model.backbone.blocks[0].attn.proj.bias.norm() > 0  # the output of a block that reads nothing is its bias
    assert bias and still['blocks'][0]['stage1'] != still['blocks'][0]['swap']
    assert still['blocks'][1]['stage1'] == still['blocks'][1]['swap']  # which reads what the teacher's reads
    assert '| aligned |' in out and still['checkpoint'].endswith('stage1.pth') and 'steps' not in still
    for words, message in [(['--measure', '9'], 'has 12 images, and --measure 9 and one batch of 4 need more'),
                           (['--keep', '0'], '--keep must be at least 1, got 0'),
                           (['--cfg-options', 'model.type=adala_mm.FeatureAlignment'], 'is no config of stage 1')]:
        with pytest.raises(SystemExit):
            run(*words)
        assert message in capsys.readouterr().err


# --- loss terms ------------------------------------------------------------------------------------------------------


def transcribed(name: str, student: torch.Tensor, teacher: torch.Tensor, prefix: int, class_token: bool,
                chosen: torch.Tensor | None) -> torch.Tensor:
    """A term in float64, token by token."""
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 1 - (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())

    batch, n, _ = student.shape
    if name == 'class_token':
        pairs = [(x[0], y[0]) if class_token else (x[prefix:].mean(0), y[prefix:].mean(0))
                 for x, y in zip(student, teacher, strict=True)]
        return sum(distance(*pair) for pair in pairs) / batch
    first = prefix if name != 'mse' or chosen is not None else 0
    pairs = [(student[b, i], teacher[b, i]) for b in range(batch) for i in range(first, n)
             if chosen is None or chosen[b, i - prefix]]
    if name == 'cosine':
        return sum(distance(*pair) for pair in pairs) / len(pairs)
    differences = torch.stack([a - b for a, b in pairs])
    if name == 'mse':
        return differences.square().mean()
    size = differences.abs()
    return torch.where(size < 1, size.square() / 2, size - 0.5).mean()


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize(('prefix', 'class_token'), [(0, False), (1, True), (5, True), (4, False)])
@pytest.mark.parametrize('name', TERMS)
def test_terms_against_their_formulas(name, prefix, class_token, masked):
    student, teacher = (2 * torch.randn(2, prefix + 6, 8) for _ in range(2))
    student.requires_grad_()
    chosen = torch.tensor([[True, False, False, True, True, False], [False, True, True, True, False, False]])
    chosen = chosen if masked else None
    got = feature_terms({name: 1.0}, student, teacher, prefix, class_token, chosen)
    assert list(got) == [name]
    wide = student.detach().double().requires_grad_()
    wanted = transcribed(name, wide, teacher.double(), prefix, class_token, chosen)
    assert got[name].item() == pytest.approx(wanted.item(), rel=1e-5)
    ours, theirs = torch.autograd.grad(got[name], student)[0], torch.autograd.grad(wanted, wide)[0]
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    assert theirs.abs().max() > 0
    same = feature_terms({name: 1.0}, teacher, teacher, prefix, class_token, chosen)
    assert abs(same[name].item()) < 1e-6


def test_loss_is_the_weighted_sum_of_its_terms(pretrained):
    weights, x = dict(cosine=0.9, smooth_l1=0.1, class_token=1.0), images()
    model = stage2(pretrained, loss=weights | dict(mse=0), loss_scale=3.0).train()
    out = model.loss(x)
    assert set(out) == {'loss', 'rel_error', *weights}  # a weight of 0 turns a term off
    assert out['loss'].item() == pytest.approx(3 * sum(w * out[name].item() for name, w in weights.items()), rel=1e-5)
    single = stage2(pretrained).train().loss(x)
    assert set(single) == {'loss', 'rel_error'}
    student, teacher = model.backbone.forward_features(x), model.teacher_features(x)
    for name in weights:
        wanted = transcribed(name, student.double(), teacher.double(), 1, True, None)
        assert out[name].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-7)
    total, log = model.parse_losses(out)
    assert total.item() == out['loss'].item()  # the parts are for reading


@pytest.mark.parametrize(('weights', 'message'), [
    (dict(mes=1.0), r"loss has no term 'mes'; it may have mse, cosine, smooth_l1, class_token"),
    (dict(mse=-1.0), 'loss: the weight of mse is -1.0'), (dict(mse=True), 'loss: the weight of mse is True'),
    (dict(mse='1'), "loss: the weight of mse is '1'"), (dict(mse=float('nan')), 'loss: the weight of mse is nan')])
def test_bad_terms_raise(weights, message):
    with pytest.raises(ValueError, match=message):
        term_weights('loss', weights)


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('layers', [[0], [0, 1], [-2, -1, -1]])
@pytest.mark.parametrize('with_cp', [False, True])
def test_layers_against_what_a_head_reads(sharp_pretrained, layers, with_cp):
    trainable = r'^(?!blocks\.1\.)' if layers == [0] else None
    student = dict(with_cp=with_cp, attention=DWCONV, trainable=trainable)
    model = stage2(sharp_pretrained, layers=layers, student=student).train()
    x = images()
    out = model.loss(x)
    out['loss'].backward()

    def read(vit: torch.nn.Module) -> tuple[torch.Tensor, ...]:  # as a head does
        vit = copy.deepcopy(vit).double().train()
        vit.zero_grad()
        vit.out_type, vit.out_indices, vit.with_cp = 'raw', [i % 2 for i in layers], False
        return vit, vit(x.double())
    (student, got), (_, wanted) = read(model.backbone), read(model.frozen['teacher'])
    loss = sum((a - b.detach()).square().mean() for a, b in zip(got, wanted, strict=True)) / len(layers)
    loss.backward()
    assert out['loss'].item() == pytest.approx(loss.item(), rel=1e-4)
    errors = [(a - b).norm() / b.norm() for a, b in zip(got, wanted, strict=True)]
    assert out['rel_error'].item() == pytest.approx(sum(errors).item() / len(layers), rel=1e-4)
    ours, theirs = (dict(vit.named_parameters()) for vit in (model.backbone, student))
    for name, parameter in ours.items():
        if theirs[name].grad is None:
            assert parameter.grad is None and layers == [0] and name.startswith('blocks.1.')
        else:
            torch.testing.assert_close(parameter.grad.double(), theirs[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_scores_are_of_the_final_features_whatever_the_layers(pretrained):
    x = images()
    scores = [stage2(pretrained, layers=layers, student=dict(trainable=r'blocks\.0\.')).eval()(x, mode='predict')[0]
              for layers in ([-1], [0])]
    assert scores[0]['error'] == scores[1]['error'] > 0


def test_blocks_behind_the_last_layer_must_not_learn(pretrained):
    with pytest.raises(ValueError, match=r'layers=\[0\]: nothing behind block 0 is compared, and '
                                         r'blocks\.1\.norm1\.weight would learn: add -1 to layers, or let trainable'):
        stage2(pretrained, layers=[-2])
    step(stage2(pretrained, layers=[0], student=dict(trainable=r'blocks\.0\.')))
    # The loss of stage 1 reaches linear attentions wherever they are, and nothing else.
    options = dict(layers=[0], attention_weight=1.0)
    step(stage2(pretrained, **options, student=dict(trainable=r'blocks\.0\.|\.attn\.')))
    for student in (dict(trainable=r'blocks\.0\.|\.mlp\.'),
                    dict(trainable=r'blocks\.0\.|\.attn\.', attention=[LINEAR, SOFTMAX])):
        with pytest.raises(ValueError, match=r'blocks\.1\.(mlp|attn)\.\S+ would learn'):
            stage2(pretrained, **options, student=student)


# --- hidden patches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('ratio', 'hidden'), [(0.01, 1), (0.25, 3), (0.5, 6), (0.75, 9)])
def test_random_patches(ratio, hidden):
    mask = random_patches(400, (3, 4), ratio, torch.device('cpu'))
    assert mask.shape == (400, 12) and mask.dtype == torch.bool
    assert set(mask.sum(dim=1).tolist()) == {hidden}
    assert mask.any(dim=0).all() and len({tuple(row) for row in mask.tolist()}) > 5  # any patch, each image its own


def test_hidden_patches_leave_the_bias_and_nothing_else_changes(pretrained):
    vit, x = stage2(pretrained).backbone, images(2, (32, 48))
    grid = (4, 6)
    mask = random_patches(2, grid, 0.5, x.device)
    seen = hide_patches(x, mask, grid)
    before, after = (vit.patch_embed(pixels).flatten(2).transpose(1, 2) for pixels in (x, seen))
    torch.testing.assert_close(after[mask], vit.patch_embed.proj.bias.expand_as(after[mask]))
    torch.testing.assert_close(after[~mask], before[~mask])


@pytest.mark.parametrize('masked_only', [False, True])
def test_masked_distillation_against_two_networks(pretrained, masked_only):
    model, x = stage2(pretrained, mask_ratio=0.5, masked_only=masked_only).train(), images()
    torch.manual_seed(5)
    out = model.loss(x)
    torch.manual_seed(5)
    mask = random_patches(3, (4, 4), 0.5, x.device)
    teacher = model.teacher_features(x)  # it sees all
    student = model.backbone.forward_features(hide_patches(x, mask, (4, 4)))
    difference = student - teacher
    if masked_only:
        difference = difference[:, 1:][mask]
    assert out['loss'].item() == pytest.approx(difference.square().mean().item(), rel=1e-5)
    assert list(model.state_dict()) == [f'backbone.{key}' for key in model.backbone.state_dict()]  # no token is kept
    # Validation is of whole images.
    assert torch.equal(model.eval()(x), model.backbone.forward_features(x))


# --- attention loss in stage 2 ---------------------------------------------------------------------------------------


def test_attention_weight_adds_the_loss_of_stage_1(pretrained):
    x, weight = images(), 50.0
    first, plain = stage1(pretrained, [LINEAR, SOFTMAX]).train(), dict(attention=[LINEAR, SOFTMAX])
    both, alone = (stage2(pretrained, student=plain, loss_scale=3.0, **options).train()
                   for options in (dict(attention_weight=weight), {}))
    outs = [model.loss(x) for model in (first, alone, both)]
    for out in outs:
        out['loss'].backward()
    assert outs[2]['attention_mse'].item() == pytest.approx(outs[0]['loss'].item(), rel=1e-5)
    assert not outs[2]['attention_mse'].requires_grad
    assert outs[2]['loss'].item() == pytest.approx(outs[1]['loss'].item() + weight * outs[0]['loss'].item(), rel=1e-5)
    grads = [{name: p.grad for name, p in model.backbone.named_parameters()} for model in (first, alone, both)]
    for name, grad in grads[2].items():
        if '.attn.proj.' in name and name.startswith('blocks.0'):
            assert not torch.allclose(grad, grads[1][name])  # stage 1 itself keeps it as it is
        else:
            wanted = grads[1][name] + (0 if grads[0][name] is None else weight * grads[0][name])
            torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_teacher_has_no_hooks_left(pretrained):
    model = stage2(pretrained, attention_weight=1.0).train()
    model.loss(images())
    assert not any(module._forward_hooks for module in model.frozen['teacher'].modules())
    with torch.no_grad():
        assert not model.loss(images())['loss'].requires_grad


def test_teacher_is_compiled_unless_its_attentions_are_read(pretrained):
    for weight in (0.0, 1.0):
        model = stage2(pretrained, vit=dict(compile=True), init=False, attention_weight=weight)
        assert model.backbone.compile_mode
        assert bool(model.frozen['teacher'].compile_mode) == (weight == 0)


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('student', [{}, dict(with_cp=True), dict(attention=DWCONV), dict(attention=[SOFTMAX, DWCONV])],
                         ids=['plain', 'with_cp', 'dwconv', 'retained'])
@pytest.mark.parametrize('options', [
    dict(loss=dict(cosine=0.9, smooth_l1=0.1, class_token=1.0)), dict(layers=[0, 1]), dict(mask_ratio=0.5),
    dict(mask_ratio=0.5, masked_only=True), dict(attention_weight=50.0),
    dict(loss=dict(mse=5.0, cosine=1.0), layers=[0, -1], mask_ratio=0.25, masked_only=True, attention_weight=50.0),
], ids=lambda options: '-'.join(options))
def test_every_option_trains(pretrained, student, options):
    model = stage2(pretrained, student=student, **options)
    log = step(model)
    assert ('attention_mse' in log) == ('attention_weight' in options)
    assert list(model.state_dict()) == [f'backbone.{key}' for key in model.backbone.state_dict()]
    teacher = model.frozen['teacher']
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters()) and not teacher.training


@pytest.mark.parametrize('options', [
    dict(loss=dict(cosine=1.0)), dict(loss=dict(smooth_l1=1.0)), dict(loss=dict(class_token=1.0))],
    ids=lambda options: next(iter(options['loss'])))
@pytest.mark.parametrize('vit', [dict(num_registers=2), dict(class_token=False)], ids=['registers', 'no_class_token'])
def test_single_terms_reach_all_that_learns(options, vit):
    model = stage2(None, vit=vit, init=False, student=dict(attention=DWCONV), **options)
    for parameter in (*model.backbone.parameters(), *model.frozen['teacher'].parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    model.train().loss(images())['loss'].backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


@pytest.mark.parametrize(('options', 'message'), [
    (dict(loss=dict(mes=1.0)), "loss has no term 'mes'"), (dict(loss={}), 'at least one term needs a weight above 0'),
    (dict(loss=dict(mse=0.0)), 'at least one term needs a weight above 0'),
    (dict(layers=[]), 'name at least one block, from -2 to 1 in a ViT of depth=2'),
    (dict(layers=[0, 2]), r'layers=\[0, 2\]: name at least one block, from -2 to 1'),
    (dict(mask_ratio=1.0), r'mask_ratio=1.0 must lie in \[0, 1\)'), (dict(mask_ratio=-0.1), 'mask_ratio=-0.1'),
    (dict(masked_only=True), 'masked_only=True compares hidden patches only'),
    (dict(attention_weight=-1.0), 'attention_weight=-1.0 must not be negative'),
    (dict(attention_weight=1.0, student=dict(attention=SOFTMAX)), 'no linear attention of the backbone learns'),
    (dict(attention_weight=1.0, student=dict(trainable='mlp')), 'no linear attention of the backbone learns'),
    (dict(layers=[0], student=dict(depth=3)), r'differ in depth \(3 and 2\): layers=\[0\]'),
    (dict(attention_weight=1.0, student=dict(depth=3)), 'differ in depth'),
])
def test_bad_options_raise(pretrained, options, message):
    with pytest.raises(ValueError, match=message):
        stage2(pretrained, init=False, **options)


def test_layer_tokens_of_the_last_block_are_the_final_features(pretrained):
    vit, x = stage2(pretrained).backbone, images()
    (last,) = layer_tokens(vit, x)
    assert torch.equal(last, vit.forward_features(x))
