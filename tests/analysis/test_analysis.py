"""The analysis tools: their numbers against independent computations, their pictures, and what they refuse."""
from __future__ import annotations

import argparse
import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import ImgDataPreprocessor
from PIL import Image
from torch import nn

from adala_mm import analysis
from adala_mm.analysis import attention_maps
from adala_mm.analysis.comparison import Comparison
from adala_mm.analysis.images import named_images, spread, validation_images
from adala_mm.analysis.networks import teacher_config
from adala_mm.analysis.prediction import class_names
from adala_mm.datasets.beacons import draw_scene
from adala_mm.evaluation import AlignmentMetric
from adala_mm.models.attentions import build_attention
from adala_mm.registry import MODELS
from adala_mm.utils.cost import multiply_adds
from adala_mm.utils.pictures import picture_grid
from helpers import LINEAR, ROOT, tiny_vit

SOFTMAX = dict(type='adala_mm.SoftmaxAttention')
NORM = dict(type='ImgDataPreprocessor', mean=[110.0, 120.0, 130.0], std=[50.0, 55.0, 60.0], bgr_to_rgb=True)
TOOLS = ROOT / 'tools/analysis_tools'
COUNT = 14


@pytest.fixture(scope='module')
def world(tmp_path_factory, sharp_pretrained) -> dict[str, Path]:
    """Drawn images, a student's checkpoint, and configs of all stages around a tiny softmax teacher."""
    root = tmp_path_factory.mktemp('analysis')
    (root / 'images').mkdir()
    for i in range(COUNT):
        Image.fromarray(draw_scene(np.random.default_rng(i), 48)[0]).save(root / f'images/{i:02d}.png')
    teacher = tiny_vit(init_cfg=sharp_pretrained)
    student = tiny_vit(attention=LINEAR, init_cfg=sharp_pretrained)
    state = torch.load(sharp_pretrained['checkpoint'])
    generator = torch.Generator().manual_seed(5)
    near = {f'backbone.{key}': value + 0.02 * torch.randn(value.shape, generator=generator)
            for key, value in state.items()}
    torch.save(dict(state_dict=near), root / 'near.pth')
    val = dict(batch_size=2, num_workers=0, dataset=dict(
        type='adala_mm.ImageFiles', data_root=str(root), data_prefix='images', pipeline=[]))

    def config(name: str, scope: str = 'mmpretrain', **model) -> None:
        Config(dict(default_scope=scope, val_dataloader=val, model=model)).dump(root / f'{name}.py')

    config('stage1', type='adala_mm.AttentionAlignment', backbone=student, data_preprocessor=NORM)
    config('stage2', type='adala_mm.FeatureAlignment', backbone=student, teacher=teacher, data_preprocessor=NORM)
    head = dict(type='FCNHead', in_channels=32, channels=32, num_convs=0, concat_input=False, num_classes=4,
                dropout_ratio=0.0, align_corners=False, loss_decode=dict(type='CrossEntropyLoss'))
    seg = dict(type='SegDataPreProcessor', size=(32, 32), test_cfg=dict(size_divisor=8),
               **{key: NORM[key] for key in ('mean', 'std', 'bgr_to_rgb')})
    config('stage3', 'mmseg', type='EncoderDecoder', backbone=student, decode_head=head, data_preprocessor=seg,
           test_cfg=dict(mode='whole'))
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in state.items()}
                    | {'decode_head.conv_seg.bias': torch.zeros(4)}), root / 'tuned.pth')
    config('task', 'mmseg', type='adala_mm.TaskModelAlignment', task_model='EncoderDecoder', backbone=student,
           teacher=dict(type='Pretrained', checkpoint=str(root / 'tuned.pth')), decode_head=head,
           data_preprocessor=seg)
    config('softmax', 'mmseg', type='EncoderDecoder', backbone=teacher, decode_head=head, data_preprocessor=seg)
    config('foreign', type='EncoderDecoder', backbone=dict(type='ResNet', depth=18), decode_head=head)
    config('deeper', type='adala_mm.FeatureAlignment', backbone=student | dict(depth=3), teacher=teacher)
    return {path.stem: path for path in [*root.glob('*.py'), root / 'near.pth', root / 'images']}


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**dict(data_root=None, cfg_options=None, trust_checkpoint=False, device='cpu') | changes)


def load(world: dict[str, Path], *students: str, teacher: str | None = None, **changes):
    specs = [analysis.Spec.parse(text.format_map(world)) for text in students]
    return analysis.load_networks(teacher and analysis.Spec.parse(teacher.format_map(world)), specs,
                                  arguments(**changes))


@pytest.fixture
def tool(monkeypatch, capsys):
    def call(name: str, *words: str | Path) -> str:
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, words)])
        runpy.run_path(str(TOOLS / f'{name}.py'), run_name='__main__')
        return capsys.readouterr().out
    return call


def refused(tool, *words: str | Path) -> str:
    with pytest.raises(SystemExit) as info:
        tool(*words)
    assert isinstance(info.value.code, str), 'one message, not a usage error'
    assert '\n' not in info.value.code
    return info.value.code


def pixels(path: Path) -> np.ndarray:
    """Of a picture that is one: not blank."""
    found = np.asarray(Image.open(path).convert('RGB')).astype(float)
    assert min(found.shape[:2]) > 150 and found.std() > 10
    assert (found != found[0, 0]).any(axis=-1).mean() > 0.02
    return found


def provenance(data: dict, names: list[str]) -> None:
    assert [network['name'] for network in data['networks']] == names
    assert all(re.fullmatch('[0-9a-f]{64}', network['sha256']) for network in data['networks'])
    assert data['versions']['torch'] and data['machine']['device'] and 'commit' in data['source']


# --- similarity


def hsic_by_definition(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """U-statistic of Gretton et al. 2005: sums over tuples of distinct examples."""
    n = len(k)
    pairs = [k[i, j] * l[i, j] for i, j in itertools.permutations(range(n), 2)]
    threes = [k[i, j] * l[i, q] for i, j, q in itertools.permutations(range(n), 3)]
    fours = [k[i, j] * l[q, r] for i, j, q, r in itertools.permutations(range(n), 4)]
    return np.mean(pairs) - 2 * np.mean(threes) + np.mean(fours)


@pytest.mark.parametrize('n', [4, 5, 7])
def test_unbiased_hsic(n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 3)) + 2, rng.normal(size=(n, 5)) - 1
    found = analysis.unbiased_hsic(torch.tensor(x @ x.T), torch.tensor(y @ y.T)).item()
    assert found == pytest.approx(hsic_by_definition(x @ x.T, y @ y.T), rel=1e-9)


def test_minibatch_cka_averages_over_batches_before_it_divides():
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(size, 2, 4)) for size in (6, 5)]
    others = [batch @ rng.normal(size=(4, 3)) + rng.normal(size=(len(batch), 2, 3)) for batch in batches]
    sums, cka = np.zeros(3), analysis.MinibatchCKA()
    assert cka.value() is None
    for x, y in zip(batches, others, strict=True):
        cka.update(torch.tensor(x), torch.tensor(y))
        k, l = (a.reshape(len(a), -1) @ a.reshape(len(a), -1).T for a in (x, y))  # noqa: E741
        sums += [hsic_by_definition(k, l), hsic_by_definition(k, k), hsic_by_definition(l, l)]
    assert cka.value() == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), rel=1e-9)


def test_cka_does_not_mind_rotation_scale_and_shift():
    x = torch.randn(12, 8) + 3
    turn = torch.linalg.qr(torch.randn(8, 8))[0]
    for y, wanted in ((x, 1), (3 * x @ turn - 5, 1)):
        cka = analysis.MinibatchCKA()
        cka.update(x, y)
        assert cka.value() == pytest.approx(wanted, abs=1e-5)
    nothing = analysis.MinibatchCKA()
    for _ in range(60):
        nothing.update(torch.randn(12, 8), torch.randn(12, 8))
    assert abs(nothing.value()) < 0.1  # unbiased: the usual estimate would be about 0.4


@pytest.mark.parametrize('k', [1, 4])
def test_knn_agreement(k):
    rng = np.random.default_rng(k)
    teacher = rng.normal(size=(15, 6))
    student = teacher + 0.7 * rng.normal(size=teacher.shape)

    def nearest(features: np.ndarray) -> list[set[int]]:
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -2)
        return [set(np.argsort(-row)[:k]) for row in similarity]

    wanted = 100 * np.mean([len(a & b) / k for a, b in zip(nearest(student), nearest(teacher), strict=True)])
    found = analysis.knn_agreement(torch.tensor(student), torch.tensor(teacher), k)
    assert 0 < wanted < 100 and found == pytest.approx(wanted, abs=1e-4)


def test_probe_finds_planted_classes():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 200)
    teacher = 20 * np.eye(6)[truth] + rng.normal(size=(200, 6))
    fit = np.arange(200) < 100
    turned = analysis.probe_agreement(teacher @ rng.normal(size=(6, 6)) + 7, teacher, fit, 4)
    assert turned['student'] > 97 and turned['teacher'] > 97
    # What k-means finds is what was planted, so its most frequent class is known, too.
    assert turned['largest'] == pytest.approx(100 * np.bincount(truth[~fit]).max() / 100)
    noise = analysis.probe_agreement(rng.normal(size=(200, 6)), teacher, fit, 4)
    assert noise['student'] < 50 and noise['teacher'] == turned['teacher']
    half = teacher.copy()
    half[150:] = teacher[rng.permutation(50) + 150]  # what is held out: 50 right, 50 shuffled
    assert 50 < analysis.probe_agreement(half, teacher, fit, 4)['student'] < 85


def test_probe_is_ridge_regression_to_indicators():
    rng = np.random.default_rng(1)
    teacher = 20 * np.eye(5)[rng.integers(0, 3, 90)] + rng.normal(size=(90, 5))
    student = teacher @ rng.normal(size=(5, 60)) + 40 * rng.normal(size=(90, 60))  # more channels than samples
    fit = np.arange(90) % 2 == 0
    classes = np.unique(teacher[:, :3].argmax(axis=1), return_inverse=True)[1]
    x = (student - student[fit].mean(axis=0)) / student[fit].std(axis=0)
    penalty = np.sqrt(0.01 * 45) * np.eye(61)[:60]  # none on the bias
    rows = np.vstack([np.hstack([x[fit], np.ones((45, 1))]), penalty])
    weights = np.linalg.lstsq(rows, np.vstack([np.eye(3)[classes[fit]], np.zeros((60, 3))]), rcond=None)[0]
    found = (x[~fit] @ weights[:60] + weights[60]).argmax(axis=1)
    wanted = 100 * (found == classes[~fit]).mean()
    assert 40 < wanted < 100
    assert analysis.probe_agreement(student, teacher, fit, 3)['student'] == pytest.approx(wanted)


def test_probe_needs_samples():
    with pytest.raises(ValueError, match='2 samples to fit with and 2 held out are too few for 3 clusters'):
        analysis.probe_agreement(np.eye(4), np.eye(4), np.arange(4) < 2, 3)


# --- attention maps


def entropy_by_definition(attn: nn.Module, h: torch.Tensor, kernel) -> np.ndarray:
    b, n, c = h.shape
    qkv = (h.double() @ attn.qkv.weight.T.double() + attn.qkv.bias.double()).detach().numpy()
    q, k, _ = qkv.reshape(b, n, 3, attn.num_heads, -1).transpose(2, 0, 3, 1, 4)
    weights = kernel(q, k)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return -(weights * np.log(weights)).sum(axis=-1).mean(axis=(0, 2)) / np.log(n)


@pytest.mark.parametrize(('options', 'kernel'), [
    (SOFTMAX, lambda q, k: np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))),
    (LINEAR, lambda q, k: np.where(q > 0, q + 1, np.exp(q)) @ np.where(k > 0, k + 1, np.exp(k)).swapaxes(-1, -2)),
    (LINEAR | dict(feature_map='softplus'),
     lambda q, k: np.log1p(np.exp(q)) @ np.log1p(np.exp(k)).swapaxes(-1, -2)),
    (LINEAR | dict(feature_map='exp'), lambda q, k: np.exp(q) @ np.exp(k).swapaxes(-1, -2)),
], ids=['softmax', 'elu1', 'softplus', 'exp'])
def test_entropy(options, kernel, monkeypatch):
    attn = build_attention(options, 24, 3)
    nn.init.normal_(attn.qkv.weight, std=0.4)
    h = torch.randn(2, 13, 24)
    wanted = entropy_by_definition(attn, h, kernel)
    found = analysis.attention_entropy(attn, h, (3, 4), 1)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)
    assert 0.05 < wanted.min() and wanted.max() < 0.999
    monkeypatch.setattr(attention_maps, 'QUERIES', 5)
    np.testing.assert_allclose(analysis.attention_entropy(attn, h, (3, 4), 1).numpy(), found.numpy(), rtol=1e-5)


def test_entropy_of_equal_weights_is_one_and_of_unknown_ones_is_none():
    h = torch.randn(2, 17, 24)
    for options in (SOFTMAX, LINEAR, dict(type='adala_mm.HedgehogAttention')):
        attn = build_attention(options, 24, 3)
        nn.init.zeros_(attn.qkv.weight)
        nn.init.zeros_(attn.qkv.bias)
        torch.testing.assert_close(analysis.attention_entropy(attn, h, (4, 4), 1), torch.ones(3))
    for options in (dict(type='adala_mm.MonarchAttention'), LINEAR | dict(feature_map='identity')):
        assert analysis.attention_entropy(build_attention(options, 24, 3, grid=(4, 4)), h, (4, 4), 1) is None


# --- networks and images


@pytest.mark.parametrize(('text', 'wanted'), [
    ('a/b.py', ('b', 'a/b.py', None)), ('b.py:w/x.pth', ('b x', 'b.py', 'w/x.pth')),
    ('stage 1=a/b.py:w.pth', ('stage 1', 'a/b.py', 'w.pth')), ('s=b.py:timm://vit', ('s', 'b.py', 'timm://vit')),
    ('dir=1/b.yaml', ('dir', '1/b.yaml', None)), ('x/lr=1/b.py', ('b', 'x/lr=1/b.py', None))])
def test_names_on_the_command_line(text, wanted):
    spec = analysis.Spec.parse(text)
    assert (spec.name, spec.config, spec.checkpoint) == wanted


@pytest.mark.parametrize('text', ['weights.pth', '', 'a=b'])
def test_what_is_no_name(text):
    with pytest.raises(argparse.ArgumentTypeError, match='CONFIG'):
        analysis.Spec.parse(text)


@pytest.mark.parametrize(('student', 'teacher'), [
    ('{stage1}', None), ('{stage2}', None), ('{stage3}:{near}', '{softmax}'), ('{stage3}:{near}', '{stage1}'),
    ('{stage3}:{near}', '{stage2}'), ('{task}:{near}', None), ('{stage3}:{near}', '{task}')])
def test_every_config_names_the_same_teacher(world, student, teacher, sharp_pretrained):
    found, (own,) = load(world, student, teacher=teacher)
    wanted = torch.load(sharp_pretrained['checkpoint'])
    assert found.model.num_softmax_blocks == 2 and own.model.num_softmax_blocks == 0
    assert all(torch.equal(value, wanted[key]) for key, value in found.model.state_dict().items())
    assert found.record['softmax_blocks'] == 2 and own.record['linear_blocks'] == 2
    assert not any(p.requires_grad for n in (found, own) for p in n.model.parameters()) and not own.model.training
    state = torch.load(world['near'])['state_dict'] if 'near' in student else wanted
    key = 'backbone.blocks.0.attn.qkv.weight' if 'near' in student else 'blocks.0.attn.qkv.weight'
    assert torch.equal(own.model.blocks[0].attn.qkv.weight, state[key])


@pytest.mark.parametrize(('students', 'teacher', 'message'), [
    (['{stage3}:{near}'], None, 'one teacher is needed, and these students name none'),
    (['{stage3}:{near}'], '{stage3}', 'no softmax attention in all of its blocks'),
    (['{stage3}:{near}'], '{stage1}:{near}', 'what a stage writes is a student'),
    (['{foreign}'], '{softmax}', 'backbone is ResNet, and only blocks of adala_mm.AdaLAViT'),
    (['{stage1}', '{stage1}'], None, 'more than one network is called stage1'),
    (['teacher={stage1}'], None, 'more than one network is called teacher'),
    (['{stage1}:absent.pth'], None, 'no checkpoint at absent.pth'),
    (['{stage1}:{deeper}'], None, 'cannot read the checkpoint'),
    (['absent.py'], None, 'no config at absent.py')])
def test_networks_that_are_refused(world, students, teacher, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        load(world, *students, teacher=teacher)


def test_two_teachers_are_one_too_many(world, tmp_path, pretrained):
    cfg = Config.fromfile(world['stage2'])
    cfg.model.teacher.init_cfg = pretrained
    cfg.dump(tmp_path / 'other.py')
    with pytest.raises(ValueError, match='name different teachers'):
        load(world, '{stage1}', str(tmp_path / 'other.py'))
    load(world, '{stage1}', str(tmp_path / 'other.py'), teacher='{stage1}')


def test_networks_that_cannot_be_compared(world, tmp_path):
    cfg = Config.fromfile(world['stage3'])
    cfg.model.backbone.update(depth=1)
    cfg.dump(tmp_path / 'shallow.py')
    state = {k: v for k, v in torch.load(world['near'])['state_dict'].items() if 'blocks.1' not in k}
    torch.save(state, tmp_path / 'shallow.pth')
    teacher, students = load(world, f'{tmp_path}/shallow.py:{tmp_path}/shallow.pth', teacher='{softmax}')
    analysis.require_equal(teacher, students, 'embed_dim', 'patch_size', 'num_prefix')
    with pytest.raises(ValueError, match=r'shallow shallow and the teacher differ in depth \(1 and 2\)'):
        analysis.require_equal(teacher, students, 'depth')


def test_images_are_normalised_as_the_config_does_it(world):
    path = str(world['images'] / '03.png')
    bgr = torch.from_numpy(cv2.imread(path)).permute(2, 0, 1)
    rgb = [analysis.read_image(path, (48, 48))]
    for changes in ({}, dict(bgr_to_rgb=False), dict(mean=None, std=None)):
        options = NORM | changes
        wanted = ImgDataPreprocessor(**{k: v for k, v in options.items() if k != 'type'})(dict(inputs=[bgr]))['inputs']
        torch.testing.assert_close(analysis.normalise(rgb, options), wanted.float())
    mmpretrain = {'to_rgb': True} | {k: v for k, v in NORM.items() if k in ('mean', 'std')}
    torch.testing.assert_close(analysis.normalise(rgb, mmpretrain), analysis.normalise(rgb, NORM))


def test_images_fill_the_size_from_their_middle(tmp_path):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = [200, 100, 0]
    Image.fromarray(picture).save(tmp_path / 'wide.png')
    found = analysis.read_image(str(tmp_path / 'wide.png'), (20, 20))
    assert found.shape == (20, 20, 3) and (found == [200, 100, 0]).all()
    assert analysis.read_image(str(tmp_path / 'wide.png'), (40, 16)).shape == (40, 16, 3)
    (tmp_path / 'wide.png').write_bytes((tmp_path / 'wide.png').read_bytes()[:60])
    with pytest.raises(ValueError, match=r'cannot read the image .*wide.png'):
        analysis.read_image(str(tmp_path / 'wide.png'), (20, 20))


def test_images_by_name(world, tmp_path):
    one, folder = str(world['images'] / '05.png'), str(world['images'])
    assert named_images([one]) == [one]
    assert [Path(path).name for path in named_images([folder], 3)] == ['00.png', '06.png', '13.png']
    assert len(named_images([folder, one], 99)) == COUNT + 1
    assert spread(5, 9) == [0, 1, 2, 3, 4] and spread(9, 1) == [0]
    with pytest.raises(FileNotFoundError, match='absent: there is no such file or folder'):
        named_images([str(tmp_path / 'absent')])
    (tmp_path / 'empty').mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match='empty'):
        named_images([str(tmp_path / 'empty')])


def test_images_of_the_config(world):
    cfg = Config.fromfile(world['stage1'])
    assert [Path(path).name for path in validation_images(cfg, 2)] == ['00.png', '13.png']
    cfg.val_dataloader.dataset.data_prefix = 'nowhere'
    with pytest.raises(FileNotFoundError, match='val_dataloader: .*nowhere does not exist'):
        validation_images(cfg, 2)
    cfg.val_dataloader = None
    with pytest.raises(ValueError, match='has no validation set: say which images'):
        validation_images(cfg, 2)


# --- comparison


def batches(world, networks, size: int) -> list[list[torch.Tensor]]:
    images = [analysis.read_image(path, (32, 32)) for path in named_images([str(world['images'])])]
    return [[analysis.normalise(images[i:i + size], n.preprocessor) for n in networks]
            for i in range(0, len(images), size)]


def compared(world, *students: str, size: int = COUNT) -> tuple[dict, list]:
    teacher, own = load(world, *students)
    comparison = Comparison(teacher, own)
    for batch in batches(world, (teacher, *own), size):
        comparison.update(batch)
    return comparison.results([1, 3], 4), [teacher, *own]


def test_errors_are_those_that_the_stages_report(world):
    found, networks = compared(world, 'swap={stage1}', 'near={stage2}:{near}')
    (images, *_), = batches(world, networks, COUNT)
    stage1 = MODELS.build(Config.fromfile(world['stage1']).model)
    stage1.init_weights()
    with torch.no_grad():
        stage1.loss(images)
    own = [block['attention_error'] for block in found['students'][0]['blocks']]
    np.testing.assert_allclose(own, stage1.block_errors.numpy(), rtol=1e-4)

    stage2 = MODELS.build(Config.fromfile(world['stage2']).model)
    stage2.init_weights()
    stage2.backbone.load_state_dict(networks[2].model.state_dict())
    with torch.no_grad():
        samples = stage2(images, mode='predict')
    wanted = AlignmentMetric().compute_metrics(samples)
    row = found['students'][1]
    assert row['rel_error'] == pytest.approx(wanted['rel_error'], rel=1e-4) and row['rel_error'] > 0.01
    assert row['cosine'] == pytest.approx(wanted['cosine'], rel=1e-4)
    student, teacher = (torch.stack(side) for side in zip(*(s['pooled'] for s in samples), strict=True))
    assert row['knn'] == {str(k): pytest.approx(analysis.knn_agreement(student, teacher, k)) for k in (1, 3)}


def test_features_of_the_blocks(world):
    found, (teacher, student) = compared(world, 'near={stage2}:{near}')
    (images, _), = batches(world, (teacher, student), COUNT)
    streams, features, hw, prefix = [], [], (4, 4), 1
    for vit in (teacher.model, student.model):
        vit.out_indices, vit.out_type = [0, 1], 'raw'
        with torch.no_grad():
            streams.append(vit.run_blocks(*vit.embed(images)))
            features.append([tokens.double() for tokens in vit(images)])
    with torch.no_grad():
        local = student.model.norm(student.model.blocks[1](streams[0][0], hw, prefix)).double()
    for i, block in enumerate(found['students'][0]['blocks']):
        theirs, ours = features[0][i], features[1][i]
        assert block['rel_error'] == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-4)
        assert block['cosine'] == pytest.approx(torch.cosine_similarity(ours, theirs, dim=-1).mean().item(), rel=1e-4)
        k, l = ((x.flatten(1) @ x.flatten(1).T).numpy() for x in (ours, theirs))  # noqa: E741
        cross, own, other = (hsic_by_definition(a[:7, :7], b[:7, :7]) for a, b in ((k, l), (k, k), (l, l)))
        few = analysis.MinibatchCKA()
        few.update(ours[:7], theirs[:7])
        assert few.value() == pytest.approx(cross / np.sqrt(own * other), rel=1e-6)
        whole = analysis.MinibatchCKA()
        whole.update(ours, theirs)
        assert block['cka'] == pytest.approx(whole.value(), rel=1e-4)
    last = found['students'][0]['blocks'][1]
    distance = (local - features[0][1]).norm() / features[0][1].norm()
    assert last['block_error'] == pytest.approx(distance.item(), rel=1e-3)
    h = student.model.blocks[1].norm1(streams[1][0])
    entropy = analysis.attention_entropy(student.model.blocks[1].attn, h, hw, prefix).tolist()
    assert last['entropy_of_heads'] == pytest.approx(entropy, rel=1e-4)


def test_sums_do_not_depend_on_the_batches(world):
    whole, _ = compared(world, 'near={stage2}:{near}')
    parts, _ = compared(world, 'near={stage2}:{near}', size=5)
    for a, b in zip(whole['students'][0]['blocks'], parts['students'][0]['blocks'], strict=True):
        assert {k: v for k, v in a.items() if k != 'cka'} == {
            k: pytest.approx(v, rel=1e-4) for k, v in b.items() if k != 'cka'}
        assert a['cka'] == pytest.approx(b['cka'], abs=0.2)
    for key in ('rel_error', 'cosine', 'knn', 'probe'):
        assert whole['students'][0][key] == pytest.approx(parts['students'][0][key], rel=1e-4)


def test_a_teacher_is_like_itself(world):
    found, _ = compared(world, 'itself={softmax}', 'swap={stage1}')
    itself, swap = found['students']
    assert itself['rel_error'] < 1e-6 and itself['knn'] == {'1': 100, '3': 100}
    assert itself['probe']['student'] == itself['probe']['teacher'] >= itself['probe']['largest']
    for own, block in zip(found['teacher']['blocks'], itself['blocks'], strict=True):
        assert max(block[key] for key in ('rel_error', 'block_error', 'attention_error')) < 1e-6
        assert block['cosine'] == pytest.approx(1) and block['cka'] == pytest.approx(1)
        assert block['entropy'] == pytest.approx(own['entropy'])
    assert swap['rel_error'] > 0.05 and swap['blocks'][1]['cka'] < 0.99


# --- tools


def test_evaluate_alignment(world, tool, tmp_path):
    out = tool('evaluate_alignment', f'swap={world["stage1"]}', f'near={world["stage2"]}:{world["near"]}',
               '--k', 1, 3, '--clusters', 4, '--batch-size', 7, '--out', tmp_path)
    data = json.loads((tmp_path / 'alignment.json').read_text())
    provenance(data, ['teacher', 'swap', 'near'])
    direct, _ = compared(world, 'swap={stage1}', 'near={stage2}:{near}', size=7)
    for row, wanted in zip(data['students'], direct['students'], strict=True):
        assert row['blocks'][1]['rel_error'] == pytest.approx(wanted['blocks'][1]['rel_error'], rel=1e-4)
        assert row['probe'] == pytest.approx(wanted['probe'])
    assert len(data['images']) == COUNT and data['settings']['size'] == [32, 32]
    assert '| near |' in out and f'{data["students"][0]["rel_error"]:.3f}' in out
    pixels(tmp_path / 'alignment.png')
    message = refused(tool, 'evaluate_alignment', world['stage1'], '--out', tmp_path)
    assert 'alignment.json is there already: say --overwrite' in message
    tool('evaluate_alignment', world['stage1'], '--k', 1, '--clusters', 2, '--no-entropy', '--out', tmp_path,
         '--overwrite', '--size', 40, 24)
    data = json.loads((tmp_path / 'alignment.json').read_text())
    assert data['settings']['size'] == [40, 24] and data['teacher']['blocks'][0]['entropy'] is None
    pixels(tmp_path / 'alignment.png')


@pytest.mark.parametrize(('words', 'message'), [
    (['{stage1}', '--num-images', '10'], '10 images are too few for 10 neighbours'),
    (['{stage1}', '--batch-size', '3'], '--batch-size 3: CKA is estimated within batches of at least 4'),
    (['{stage1}', '--size', '30'], '30 x 30 pixels are not a multiple of 8; 32 x 32 are'),
    (['{stage1}', '--size', '8', '8', '8'], '--size 8 8 8: a height and a width'),
    (['{deeper}'], 'deeper'), (['{foreign}', '--teacher', '{softmax}'], 'its backbone is ResNet'),
    (['{stage3}:{near}'], 'Say --teacher'), (['{stage1}', '--images', 'absent'], 'absent: there is no such file')])
def test_what_evaluate_alignment_refuses(world, tool, tmp_path, words, message):
    def call(*words):
        return tool('evaluate_alignment', *words, '--out', tmp_path)
    with pytest.raises(SystemExit) as info:
        call(*(word.format_map(world) for word in words))
    assert message in str(info.value.code) and not list(tmp_path.iterdir())


def test_visualize_features(world, tool, tmp_path):
    out = tool('visualize_features', f'swap={world["stage1"]}', f'near={world["stage2"]}:{world["near"]}',
               '--images', world['images'], '--num-images', 3, '--out', tmp_path)
    data = json.loads((tmp_path / 'features.json').read_text())
    provenance(data, ['teacher', 'swap', 'near'])
    teacher, students = load(world, 'swap={stage1}', 'near={stage2}:{near}')
    images = [analysis.read_image(path, (32, 32)) for path in named_images([str(world['images'])], 3)]
    with torch.no_grad():
        theirs, *ours = (n.model(analysis.normalise(images, n.preprocessor))[-1].double() for n in (teacher, *students))
    for row, features in zip(data['students'], ours, strict=True):
        assert row['rel_error'] == pytest.approx(((features - theirs).norm() / theirs.norm()).item(), rel=1e-4)
    rows = theirs.permute(0, 2, 3, 1).reshape(-1, 32).numpy()
    variance = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    assert data['explained_variance'] == pytest.approx((variance[:3] / variance.sum()).tolist(), rel=1e-5)
    assert f'{data["students"][1]["rel_error"]:.3f}' in out
    height, width, _ = pixels(tmp_path / 'features.png').shape
    assert width > height  # four columns, three rows
    tool('visualize_features', f'near={world["stage2"]}:{world["near"]}', '--images', world['images'] / '00.png',
         '--block', 1, '--out', tmp_path / 'early')
    early = json.loads((tmp_path / 'early/features.json').read_text())
    assert early['students'][0]['rel_error'] != data['students'][1]['rel_error'] and len(early['images']) == 1
    assert '--block 3: blocks are 1 to 2' in refused(tool, 'visualize_features', world['stage1'], '--block', 3,
                                                     '--out', tmp_path / 'none')


def test_evaluate_resolution(world, tool, tmp_path):
    words = ['evaluate_resolution', f'near={world["stage2"]}:{world["near"]}', '--num-images', 3, '--seconds', 0]
    out = tool(*words, '--sizes', 48, 32, '--out', tmp_path)
    data = json.loads((tmp_path / 'resolution.json').read_text())
    provenance(data, ['teacher', 'near'])
    assert [(row['size'], row['name'], row['tokens']) for row in data['rows']] == [
        (32, 'teacher', 17), (32, 'near', 17), (48, 'teacher', 37), (48, 'near', 37)]
    teacher, (student,) = load(world, 'near={stage2}:{near}')
    for row in data['rows']:
        network = teacher if row['name'] == 'teacher' else student
        images = [analysis.read_image(path, (row['size'],) * 2) for path in data['images']]
        batch = analysis.normalise(images, network.preprocessor)
        macs = multiply_adds(lambda vit=network.model, image=batch[:1]: vit.forward_features(image))
        # On this CPU the cheaper order of products is taken for few tokens; it is counted where there is no device.
        assert row['gmac'] == pytest.approx(macs / 1e9, rel=0.05)
        assert row['ms'] > 0 and row['mib'] > 0
        if network is student:
            with torch.no_grad():
                theirs, ours = (n.model.forward_features(batch).double() for n in (teacher, student))
            assert row['rel_error'] == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-4)
            assert row['cosine'] == pytest.approx(torch.cosine_similarity(ours, theirs, dim=-1).mean().item(), rel=1e-4)
    assert '| 48 | 37 | near |' in out
    pixels(tmp_path / 'resolution.png')
    assert 'are not multiples of the patch size 8' in refused(tool, *words, '--sizes', 30, '--out', tmp_path / 'odd')


def test_what_would_not_fit_is_not_run(world, tool, tmp_path):
    # 1601 tokens: 40 MiB for the teacher's four attention matrices, 2.3 MiB without them.
    tool('evaluate_resolution', f'near={world["stage2"]}:{world["near"]}', '--num-images', 1, '--seconds', 0,
         '--sizes', 320, '--memory', 0.01, '--out', tmp_path)
    teacher, student = json.loads((tmp_path / 'resolution.json').read_text())['rows']
    assert teacher['note'] == 'skipped: about 0.04 GiB, 0.01 are allowed'
    assert 'ms' not in teacher and teacher['gmac'] > student['gmac']
    assert student['ms'] > 0 and 'rel_error' not in student  # no teacher to compare with
    pixels(tmp_path / 'resolution.png')


# --- curves


def write_run(folder: Path, stage: str, seed: int = 0) -> Path:
    logs = folder / '20260101_000000/vis_data'
    logs.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = [{'align/rel_error': 1.2, 'step': 0}]
    rows += [dict(loss=float(5 / step + rng.random()), rel_error=float(1 / step), lr=0.1, step=step)
             for step in range(10, 60, 10)]
    rows += [{'align/rel_error': 0.4, 'step': 50}]
    (logs / 'scalars.json').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (logs / 'config.py').write_text(f"model = dict(type='adala_mm.{stage}')\n")
    return folder


def test_plot_alignment(world, tool, tmp_path):
    one = write_run(tmp_path / 'one', 'AttentionAlignment')
    two = [write_run(tmp_path / name, 'FeatureAlignment', seed) for seed, name in enumerate(('two', 'lr=3'))]
    tool('evaluate_alignment', f'swap={world["stage1"]}', '--k', 1, '--clusters', 2, '--out', tmp_path)
    out = tool('plot_alignment', one, f'after stage 1={two[0]}', two[1], '--out', tmp_path / 'out',
               '--evaluation', tmp_path / 'alignment.json')
    data = json.loads((tmp_path / 'out/curves.json').read_text())
    assert [(run['name'], run['stage']) for run in data['runs']] == [
        ('one', 'stage 1'), ('after stage 1', 'stage 2'), ('lr=3', 'stage 2')]
    assert data['runs'][0]['curves']['align/rel_error'] == dict(steps=[0, 50], values=[1.2, 0.4])
    assert data['runs'][2]['curves']['loss']['steps'] == [10, 20, 30, 40, 50]
    evaluated = json.loads((tmp_path / 'alignment.json').read_text())['students'][0]['blocks']
    assert data['students'][0]['blocks'][1] == {k: evaluated[1][k] for k in ('attention_error', 'rel_error')}
    assert '| after stage 1 | stage 2 | 50 |' in out
    tall = pixels(tmp_path / 'out/curves.png').shape[0]
    tool('plot_alignment', one, '--out', tmp_path / 'single')
    assert tall > 2.5 * pixels(tmp_path / 'single/curves.png').shape[0]  # three rows of panels against one
    tool('plot_alignment', '--evaluation', tmp_path / 'alignment.json', '--out', tmp_path / 'blocks')
    pixels(tmp_path / 'blocks/curves.png')


def test_devices_that_are_not_there(world, tool, capsys):
    for device in ('cuda:77', 'toaster'):
        with pytest.raises(SystemExit):
            tool('evaluate_alignment', world['stage1'], '--device', device)
        assert f'argument --device: {device}: ' in capsys.readouterr().err


def test_what_plot_alignment_refuses(tool, tmp_path):
    one = write_run(tmp_path / 'one', 'AttentionAlignment')
    (tmp_path / 'x.json').write_text('{}')
    (tmp_path / 'z.json').write_text('{"students": []}')
    other = write_run(tmp_path / 'other', 'Net')
    for words, message in (
            ([tmp_path / 'absent'], 'no training log'), ([other], 'is a run of Net: only those of stage 1 and 2'),
            ([one, one], 'more than one run is called one'),
            (['--evaluation', tmp_path / 'y.json'], 'there is no such file'),
            (['--evaluation', tmp_path / 'x.json'], 'no result of evaluate_alignment.py'),
            (['--evaluation', tmp_path / 'z.json'], 'it has no students')):
        assert message in refused(tool, 'plot_alignment', *words, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    for path in one.glob('*/vis_data/config.py'):
        path.unlink()
    assert 'what was run' in refused(tool, 'plot_alignment', one, '--out', tmp_path / 'out')


# --- pictures of predictions


@pytest.fixture(scope='module')
def segmentor(world, tmp_path_factory) -> tuple[Path, Path]:
    """Config and checkpoint of a segmentor whose output depends on the image."""
    folder = tmp_path_factory.mktemp('segmentor')
    cfg = Config.fromfile(world['stage3'])
    cfg.test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    cfg.test_dataloader = dict(dataset=dict(
        type='BaseSegDataset', pipeline=cfg.test_pipeline, metainfo=dict(
            classes=['ground', 'sky', 'water', 'wood'], palette=[[200, 0, 0], [0, 200, 0], [0, 0, 200], [9, 9, 9]])))
    cfg.dump(folder / 'config.py')
    return folder / 'config.py', saved(cfg, folder / 'weights.pth')


def saved(cfg: Config, path: Path) -> Path:
    from adala_mm.export import assemble
    torch.manual_seed(3)
    model = assemble(cfg, 'model').model
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float('norm' in name and 'weight' in name), std=0.3)
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


def test_segment_image(world, segmentor, tool, tmp_path):
    source = world['images'] / '02.png'
    before = source.read_bytes()
    out = tool('segment_image', *segmentor, source, world['images'] / '04.png', '--out', tmp_path)
    data = json.loads((tmp_path / 'segmented.json').read_text())
    args = arguments(config=str(segmentor[0]), checkpoint=str(segmentor[1]))
    model = analysis.load_predictor(args, 'EncoderDecoder')
    image = analysis.normalise([analysis.read_image(str(source), (48, 48))], NORM)
    with torch.no_grad():
        label = model.encode_decode(image, [dict(ori_shape=(48, 48), img_shape=(48, 48))]).argmax(dim=1)
    counts = torch.bincount(label.flatten(), minlength=4) / label.numel()
    names = ['ground', 'sky', 'water', 'wood']
    wanted = {name: pytest.approx(count, abs=1e-6) for name, count in zip(names, counts.tolist(), strict=True) if count}
    assert data['rows'][0]['classes'] == wanted and len(wanted) > 1
    assert '02_segmented.png' in out and source.read_bytes() == before
    assert len(data['rows']) == 2 and re.fullmatch('[0-9a-f]{64}', data['model']['sha256'])
    found = pixels(tmp_path / '02_segmented.png')
    # The legend at the right has the colour of the most frequent class.
    colour = dict(zip(names, [[200, 0, 0], [0, 200, 0], [0, 0, 200], [9, 9, 9]], strict=True))[
        max(data['rows'][0]['classes'], key=data['rows'][0]['classes'].get)]
    assert (found[:, -found.shape[1] // 5:] == colour).all(axis=-1).any()


def test_pictures_replace_nothing(world, segmentor, tool, tmp_path):
    source, words = world['images'] / '02.png', ['segment_image', *segmentor]
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/x.png').write_bytes(source.read_bytes())
    (tmp_path / 'x.jpg').write_bytes(source.read_bytes())
    assert 'would both become' in refused(tool, *words, tmp_path / 'a/x.png', tmp_path / 'x.jpg', '--out', tmp_path)
    named = tmp_path / 'b_segmented.png'
    named.write_bytes(source.read_bytes())
    (tmp_path / 'b.png').write_bytes(source.read_bytes())
    message = refused(tool, *words, tmp_path / 'b.png', named, '--out', tmp_path, '--overwrite')
    assert 'b_segmented.png is one of the images' in message
    assert 'is there already: say --overwrite' in refused(tool, *words, tmp_path / 'b.png', '--out', tmp_path)
    assert named.read_bytes() == source.read_bytes()
    tool(*words, tmp_path / 'b.png', '--out', tmp_path, '--overwrite')
    assert named.read_bytes() != source.read_bytes()
    assert 'there is no such file or folder' in refused(tool, *words, 'absent.png', '--out', tmp_path / 'c')
    (tmp_path / 'cut.png').write_bytes(source.read_bytes()[:200])
    message = refused(tool, *words, source, tmp_path / 'cut.png', '--out', tmp_path / 'c')
    assert f'cannot read the image {tmp_path}/cut.png' in message and not (tmp_path / 'c').exists()
    stage = refused(tool, 'segment_image', world['stage1'], segmentor[1], source, '--out', tmp_path / 'c')
    assert 'describes a AttentionAlignment, which is no segmentor' in stage
    wrong = refused_with_lines(tool, 'segment_image', segmentor[0], world['near'], source, '--out', tmp_path / 'c')
    assert 'does not fit the model of the config' in wrong
    assert not (tmp_path / 'c').exists()


def refused_with_lines(tool, *words) -> str:
    with pytest.raises(SystemExit) as info:
        tool(*words)
    return str(info.value.code)


def test_classify_image(world, tool, tmp_path):
    cfg = Config(dict(
        default_scope='mmpretrain', model=dict(
            type='ImageClassifier', backbone=tiny_vit(attention=LINEAR, out_type='cls_token'),
            head=dict(type='LinearClsHead', num_classes=7, in_channels=32),
            data_preprocessor=dict(mean=NORM['mean'], std=NORM['std'], to_rgb=True)),
        test_dataloader=dict(dataset=dict(type='CustomDataset', pipeline=[
            dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), dict(type='PackInputs')]))))
    cfg.dump(tmp_path / 'config.py')
    weights = saved(cfg, tmp_path / 'weights.pth')
    names = ['crane'] * 7  # as two classes of ImageNet: nothing may go by name
    state = torch.load(weights) | dict(meta=dict(dataset_meta=dict(classes=names)))
    torch.save(state, weights)
    source = world['images'] / '02.png'
    out = tool('classify_image', tmp_path / 'config.py', weights, source, '--top', 3, '--out', tmp_path / 'out')
    row, = json.loads((tmp_path / 'out/classified.json').read_text())['rows']
    model = analysis.load_predictor(arguments(config=str(tmp_path / 'config.py'), checkpoint=str(weights)),
                                    'ImageClassifier')
    small = cv2.resize(cv2.imread(str(source)), (32, 32), interpolation=cv2.INTER_LINEAR)[..., ::-1]
    with torch.no_grad():
        scores = model(analysis.normalise([small.copy()], NORM), mode='tensor')[0].softmax(-1)
    top = scores.topk(3)
    assert row['classes'] == [dict(index=i, name=names[i], probability=pytest.approx(v, rel=1e-4)) for i, v in
                              zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    assert f'{top.values[0]:.1%}' in out
    pixels(tmp_path / 'out/02_classified.png')
    assert 'which is no classifier' in refused(tool, 'classify_image', world['stage3'], weights, source,
                                               '--out', tmp_path / 'other')


def test_class_names_without_any_are_numbers(world, tmp_path):
    cfg = Config.fromfile(world['stage3'])
    cfg.test_dataloader = dict(dataset=dict(type='BaseSegDataset', pipeline=[]))
    cfg.dump(tmp_path / 'config.py')
    args = arguments(config=str(tmp_path / 'config.py'), checkpoint=str(saved(cfg, tmp_path / 'weights.pth')))
    meta = analysis.load_predictor(args, 'EncoderDecoder').dataset_meta
    assert meta['classes'] == ['0', '1', '2', '3'] and len({tuple(colour) for colour in meta['palette']}) == 4


@pytest.mark.parametrize(('scope', 'kind', 'count', 'first'), [
    ('mmpretrain', 'CIFAR10', 10, 'airplane'), ('mmseg', 'CityscapesDataset', 19, 'road'),
    ('mmseg', 'adala_mm.BeaconsDataset', 6, 'ground'), ('mmseg', 'CityscapesDataset', 3, '0')])
def test_class_names_of_the_data_set(scope, kind, count, first, tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
    cfg = Config(dict(default_scope=scope, test_dataloader=dict(dataset=dict(type=kind))))
    meta = class_names(cfg, str(tmp_path / 'weights.pth'), count)
    assert meta['classes'][0] == first and len(meta['classes']) == len(meta['palette']) == count
    torch.save(dict(meta=dict(dataset_meta=dict(classes=['x'] * count))), tmp_path / 'weights.pth')
    assert class_names(cfg, str(tmp_path / 'weights.pth'), count)['classes'] == ['x'] * count  # what was trained


@pytest.fixture(scope='module')
def scored(world, segmentor, tmp_path_factory) -> tuple[Path, Path]:
    """Config with four labelled images of 40 x 56 pixels for that segmentor, and its checkpoint."""
    folder = tmp_path_factory.mktemp('scored')
    (folder / 'images').mkdir()
    for i in range(4):
        image, label = draw_scene(np.random.default_rng(i), 64)
        Image.fromarray(image[:40, :56]).save(folder / f'images/{i}.png')
        Image.fromarray(label[:40, :56] % 4).save(folder / f'images/{i}_label.png')
    (folder / 'list.txt').write_text('0\n1\n2\n3\n')
    cfg = Config.fromfile(segmentor[0])
    pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(99, 7), keep_ratio=True),
                dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    cfg.test_dataloader = dict(num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(
        cfg.test_dataloader.dataset, data_root=str(folder), ann_file='list.txt', img_suffix='.png',
        seg_map_suffix='_label.png', data_prefix=dict(img_path='images', seg_map_path='images'), pipeline=pipeline))
    cfg.test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    cfg.model.test_cfg = dict(mode='slide', crop_size=(16, 16), stride=(16, 16))
    cfg.dump(folder / 'config.py')
    return folder / 'config.py', segmentor[1]


def test_evaluate_segmentation(scored, tool, tmp_path):
    config, checkpoint = scored
    words = ['evaluate_segmentation', f'one={config}:{checkpoint}', f'two={config}:{checkpoint}']
    out = tool(*words, '--sizes', 80, 40, '--num-images', 2, '--out', tmp_path)
    data = json.loads((tmp_path / 'segmentation.json').read_text())
    assert [(row['name'], row['size'], row['num_images'], row['softmax_blocks']) for row in data['rows']] == [
        ('one', 40, 2, 0), ('two', 40, 2, 0), ('one', 80, 2, 0), ('two', 80, 2, 0)]
    model = analysis.load_predictor(arguments(config=str(config), checkpoint=str(checkpoint)), 'EncoderDecoder')
    for row in data['rows']:
        matrix, scale = torch.zeros(4, 4), row['size'] // 40
        for number in (0, 3):  # spread evenly
            image = np.asarray(Image.open(config.parent / f'images/{number}.png'))
            image = cv2.resize(image, (56 * scale, 40 * scale), interpolation=cv2.INTER_LINEAR)
            batch = analysis.normalise([image], NORM)
            with torch.no_grad():
                logits = nn.functional.interpolate(model.encode_decode(batch, [dict(
                    ori_shape=image.shape[:2], img_shape=image.shape[:2])]), (40, 56), mode='bilinear')
            label = torch.tensor(np.asarray(Image.open(config.parent / f'images/{number}_label.png')).copy()).long()
            matrix += torch.bincount(4 * label.flatten() + logits.argmax(1).flatten(), minlength=16).reshape(4, 4)
        iou = matrix.diag() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())
        assert row['miou'] == pytest.approx(100 * iou[~iou.isnan()].mean().item(), abs=0.02)
        assert row['accuracy'] == pytest.approx(100 * (matrix.diag().sum() / matrix.sum()).item(), abs=0.02)
        assert row['ms'] > 0
    assert data['rows'][0]['miou'] != data['rows'][2]['miou']
    assert [model['name'] for model in data['models']] == ['one', 'two'] and data['models'][0]['sha256']
    assert '| 80 | two | 0 / 2 |' in out
    pixels(tmp_path / 'segmentation.png')


def test_what_evaluate_segmentation_refuses(world, scored, tool, tmp_path):
    config, checkpoint = scored
    words = ['evaluate_segmentation', '--out', tmp_path / 'out']
    assert 'say CONFIG:CHECKPOINT' in refused(tool, *words, config)
    assert 'called config weights: give them names' in refused(tool, *words, *[f'{config}:{checkpoint}'] * 2)
    assert 'describes a AttentionAlignment' in refused(tool, *words, f'{world["stage1"]}:{checkpoint}')
    for change, message in (
            (dict(type='LoadImageFromNDArray'), 'begins with LoadImageFromNDArray, not LoadImageFromFile'),
            (None, 'test_evaluator gives aAcc, mDice, mAcc, and no mIoU')):
        cfg = Config.fromfile(config)
        if change:
            cfg.test_dataloader.dataset.pipeline[0] = change
        else:
            cfg.test_evaluator.iou_metrics = ['mDice']
        cfg.dump(tmp_path / 'other.py')
        assert message in refused(tool, *words, f'{tmp_path / "other.py"}:{checkpoint}', '--sizes', 40)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['segment_image', 'classify_image'])
def test_tools_start_by_themselves(name):
    """In a process that imports nothing before them: mmpretrain does not survive transformers 5 by itself."""
    done = subprocess.run([sys.executable, str(TOOLS / f'{name}.py'), '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and 'IMAGE' in done.stdout, done.stderr


def test_picture_grid(tmp_path):
    wide, high = np.full((10, 40, 3), 0.2), np.full((40, 10, 3), 0.8)
    picture_grid(tmp_path / 'new/grid.png', {'a': [wide, high], 'b': [wide / 2, high / 2], 'c': [wide, high]}, 'title')
    found = pixels(tmp_path / 'new/grid.png')
    # Both columns show what they were given, in rows as high as their pictures.
    assert all((abs(found - 255 * value) < 2).all(axis=-1).mean() > 0.01 for value in (0.2, 0.8, 0.1, 0.4))


@pytest.mark.parametrize('name', ['stage1_dinov2l_plus_coco', 'stage2_dinov2l_plus_in22k', 'task_cls_dinov2l_in1k'])
def test_a_teacher_has_no_options_of_the_linear_attention(name):
    cfg = Config.fromfile(ROOT / f'configs/beyond/{name}.py')
    cfg.model.backbone.attention = dict(type='adala_mm.HedgehogAttention', variant='exp', dwconv=3)
    cfg.model.backbone.init_cfg.prefix = 'of_the_student.'
    teacher = teacher_config(cfg).model.backbone
    assert teacher.attention == dict(type='adala_mm.SoftmaxAttention') and teacher.depth == 24
    assert ('prefix' in teacher.init_cfg) == name.startswith('stage1')  # where both start from the same file
    assert cfg.model.backbone.attention.variant == 'exp'
