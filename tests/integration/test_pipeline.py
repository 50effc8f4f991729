"""The stages end to end on a dozen generated images: in process, by command line, and under mmseg's own scripts."""
from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from safetensors.torch import load_file

from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.cli import relocate
from helpers import ROOT
from helpers.pictures import NUMBER, ade20k, cityscapes, coco, imagenet, imagenet22k
from helpers.processes import start_script, wait_for
from helpers.recipes import (
    FLAGSHIP,
    Recorder,
    apart,
    arguments,
    assert_equal,
    classifier_in1k,
    epochs,
    evaluating,
    mask2former,
    pretrained_file,
    runner,
    stage1,
    stage2,
)


class Kill(Hook):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.epoch == self.epoch:  # counted from 0; the epoch has a second iteration
            raise KeyboardInterrupt


class SeedByEpoch(Hook):
    """Augmentation draws from the process's random state, which no checkpoint holds: fix it where epochs begin."""

    def before_train_epoch(self, runner):
        random.seed(runner.epoch)
        np.random.seed(runner.epoch)
        torch.manual_seed(runner.epoch)


def backbone(state: dict) -> dict:
    found = {key: value for key, value in state.items() if key.startswith('backbone.')}
    assert len(found) > 20
    return found


def poly(base: float, steps: int) -> list[float]:
    """Learning rates of a polynomial schedule over all ``steps``; MMEngine's is zero in the last one."""
    return [base * (1 - k / (steps - 1)) ** 0.9 for k in range(steps)]


def distance(got: dict, wanted: dict) -> float:
    """Relative distance of all parameters together."""
    error = sum((got[key] - value).square().sum() for key, value in wanted.items())
    return float((error / sum(value.square().sum() for value in wanted.values())).sqrt())


@pytest.fixture(scope='module', autouse=True)
def place(tmp_path_factory) -> Iterator[Path]:
    """Where all runs of this file happen, with the pretrained model in the place of timm's."""
    place = tmp_path_factory.mktemp('pipeline')
    weights = pretrained_file(place / 'model.safetensors')
    with apart(place), pytest.MonkeyPatch.context() as patch:
        patch.setattr('huggingface_hub.hf_hub_download', lambda repository, name: str(weights))
        yield place


def assert_teacher(model, weights: str | Path) -> None:
    """The teacher of the trained ``model`` is the pretrained softmax ViT, and not the student."""
    shape = dict(img_size=64, embed_dim=32, depth=2, num_heads=4, norm_eps=1e-6, layer_scale=1e-5)
    wanted = MODELS.build(dict(shape, type='adala_mm.AdaLAViT', attention=dict(type='adala_mm.SoftmaxAttention'),
                               init_cfg=dict(type='Pretrained', checkpoint=str(weights))))
    wanted.init_weights()
    images = torch.randn(1, 3, 64, 64)
    features = wanted.forward_features(images).detach()
    torch.testing.assert_close(model.teacher_features(images), features)
    assert distance({'': model.backbone.forward_features(images).detach()}, {'': features}) > 0.01


# No path of a checkpoint is overridden from here on: every stage finds what the one before has left.
@pytest.fixture(scope='module')
def after_stage1(place) -> Path:
    """Stage 1, killed in its third epoch and resumed."""
    run = runner('stage1_dinov2l_coco', coco(place / 'data'), stage1(), SeedByEpoch(), Kill(2))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert sorted(path.name for path in Path(run.work_dir).glob('*.pth')) == ['epoch_1.pth', 'epoch_2.pth']
    record = Recorder()
    run = runner('stage1_dinov2l_coco', place / 'data', stage1(), SeedByEpoch(), record, resume=True)
    run.train()
    assert_teacher(run.model, 'model.safetensors')
    saved = load_checkpoint('work_dirs/stage1_dinov2l_coco/epoch_2.pth')
    assert record.start == 4 and len(record.losses) == 4  # 2 of 4 epochs, of 2 iterations each, were left
    assert_equal(record.state, saved['state_dict'])
    assert_equal(record.optimizer['state'], saved['optimizer']['state'])
    assert record.rates == [1e-2] * 4
    return place / 'work_dirs/stage1_dinov2l_coco/epoch_4.pth'


@pytest.fixture(scope='module')
def after_stage2(place, after_stage1) -> Path:
    record = Recorder()
    run = runner('stage2_dinov2l_in22k', imagenet22k(place / 'data'), stage2(), record)
    run.train()
    assert_equal(record.state, load_checkpoint(after_stage1)['state_dict'])
    assert record.rates == pytest.approx(poly(1e-3, 30))
    assert_teacher(run.model, 'model.safetensors')
    # 30 epochs of one iteration on two images: noisy, but far enough.
    assert np.mean(record.losses[-5:]) < 0.9 * np.mean(record.losses[:5])
    return place / 'work_dirs/stage2_dinov2l_in22k/epoch_30.pth'


def test_resumed_stage_1_equals_an_uninterrupted_one(place, after_stage1):
    record = Recorder()
    runner('stage1_dinov2l_coco', place / 'data', stage1(), SeedByEpoch(), record, work_dir='uninterrupted').train()
    got, wanted = load_checkpoint(after_stage1), load_checkpoint('uninterrupted/epoch_4.pth')
    assert_equal(got['state_dict'], wanted['state_dict'])
    assert_equal(got['optimizer'], wanted['optimizer'])
    assert (got['meta']['epoch'], got['meta']['iter']) == (4, 8) == (wanted['meta']['epoch'], wanted['meta']['iter'])
    pretrained = load_file('model.safetensors')
    resampled = {'pos_embed', 'patch_embed.proj.weight'}
    assert_equal({key: record.state[f'backbone.{key}'] for key in set(pretrained) - resampled},
                 {key: pretrained[key] for key in set(pretrained) - resampled})
    changed = {key for key, value in record.state.items() if not torch.equal(value, wanted['state_dict'][key])}
    assert changed == {f'backbone.blocks.{i}.attn.qkv.{kind}' for i in range(2) for kind in ('weight', 'bias')}


@pytest.mark.parametrize(('name', 'options', 'data'), [
    (FLAGSHIP, mask2former(), ade20k),
    ('cls_dinov2l_in1k', classifier_in1k(), imagenet),
], ids=['mask2former', 'linear'])
def test_stage_3_starts_from_stage_2(name, options, data, place, after_stage2):
    record = Recorder()
    run = runner(name, data(place / name), options | epochs(2), record)
    run.train()
    start = backbone(load_checkpoint(after_stage2)['state_dict'])
    assert_equal(backbone(record.state), start)
    assert record.rates == pytest.approx(poly(1e-5, 4)) and np.isfinite(record.losses).all()
    # The backbone learns, and is still the aligned one at the end.
    end = load_checkpoint(Path(run.work_dir) / 'epoch_2.pth')
    assert 0 < distance(backbone(end['state_dict']), start) < 0.01
    assert len(end['meta']['dataset_meta']['classes']) == (150 if name == FLAGSHIP else 1000)
    # A second run with resume=True goes on from there, with its weights and Adam's moments.
    again = Recorder()
    run = runner(name, place / name, options | epochs(3), again, resume=True)
    run.train()
    assert again.start == 4 and len(again.losses) == 2
    assert_equal(again.state, end['state_dict'])
    assert_equal(again.optimizer['state'], end['optimizer']['state'])
    assert 0 <= run.test()['mIoU' if name == FLAGSHIP else 'accuracy/top1'] <= 100


@pytest.mark.parametrize('vfm', ['clipl', 'siglipl', 'in1kl', 'dinov2b', 'dinov3l', 'siglip2l'])
def test_both_stages_of_the_other_models(vfm, place, monkeypatch):
    data = coco(imagenet22k(place / vfm))
    first = runner(f'stage1_{vfm}_coco', data, stage1() | {'train_cfg.max_epochs': 1})
    weights = pretrained_file(place / f'{vfm}.safetensors', first.cfg.pretrained.checkpoint.removeprefix('timm://'))
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda repository, name: str(weights))
    first.train()
    record = Recorder()
    checkpoint = place / f'work_dirs/stage1_{vfm}_coco/epoch_1.pth'
    runner(f'stage2_{vfm}_in22k', data, stage2() | epochs(1) | {'model.backbone.init_cfg.checkpoint': checkpoint},
           record).train()
    assert_equal(record.state, load_checkpoint(checkpoint)['state_dict'])
    assert np.isfinite(record.losses).all() and len(record.losses) == 1


def test_cityscapes_layout(place):
    record = Recorder()
    options = mask2former() | epochs(1) | {'model.backbone.init_cfg': None} | evaluating(
        **{'dataset.pipeline.1.scale': (128, 64)})
    run = runner('mask2former_dinov2l_cityscapes', cityscapes(place / 'streets'), options, record)
    run.train()
    assert len(run.train_dataloader.dataset) == 4 and len(record.losses) == 2
    assert 0 <= run.test()['mIoU'] <= 100
    assert len(run.test_dataloader.dataset) == 1


def python(*commands: list[str | Path], cwd: Path) -> list[str]:
    """Outputs of the commands, which run side by side: starting up takes most of their time."""
    environment = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', MPLBACKEND='Agg')
    logs = [cwd / f'console_{next(NUMBER)}.log' for _ in commands]
    running = []
    try:
        for words, log in zip(commands, logs, strict=True):
            with open(log, 'w') as file:
                running.append(subprocess.Popen([sys.executable, '-W', 'ignore', *map(str, words)], cwd=cwd,
                                                env=environment, stdout=file, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()  # nothing to kill unless something went wrong
    outputs = [log.read_text() for log in logs]
    assert not any(codes), '\n'.join(out[-3000:] for out in outputs)
    return outputs


def command(tool: str, *words: str, **options) -> list[str | Path]:
    """tools/<tool>.py on the flagship, made small and with random weights."""
    options = mask2former() | {'model.backbone.init_cfg': None} | options
    return [ROOT / f'tools/{tool}.py', ROOT / f'configs/adala/{FLAGSHIP}.py', *words, '--data-root', 'cli_data',
            '--cfg-options', *arguments(options)]


def tool(*commands: list[str | Path], cwd: Path) -> list[str]:
    """The same for commands of `command`, in processes forked off this one."""
    logs = [cwd / f'tool_{next(NUMBER)}.log' for _ in commands]
    codes = wait_for(*(start_script(*words, place=cwd, log=log) for words, log in zip(commands, logs, strict=True)))
    outputs = [log.read_text() for log in logs]
    assert not any(codes), '\n'.join(out[-3000:] for out in outputs)
    return outputs


def scores(work_dir: Path) -> dict:
    """What the newest test run in the work dir has written."""
    return json.loads(max(work_dir.glob('*/[0-9]*.json')).read_text())


def first_score(work_dir: Path) -> dict:
    """What the first run in the work dir wrote after its first epoch; a quick one shares its file with the next."""
    lines = min(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    return next(scores for scores in map(json.loads, lines) if 'loss' not in scores)


@pytest.fixture(scope='module')
def trained(place) -> Path:
    """Work dir of the flagship, trained for one epoch by command line."""
    ade20k(place / 'cli_data')
    out, = tool(command('train', '--work-dir', 'flagship', **epochs(1)), cwd=place)
    assert 'Epoch(train)' in out and 'mIoU' in out
    # The dumped config holds all overrides; a resumed run writes over it.
    shutil.copy(place / f'flagship/{FLAGSHIP}.py', place / 'dumped.py')
    return place / 'flagship'


def test_command_line(trained, place):
    resumed, = tool(command('train', '--work-dir', 'flagship', '--resume', **epochs(2)), cwd=place)
    tested, = python(
        command('test', 'flagship/epoch_1.pth', '--work-dir', 'tested', '--show-dir', 'pictures', '--out', 'labelled'),
        cwd=place)
    assert 'resumed epoch: 1, iter: 2' in resumed
    assert load_checkpoint(trained / 'epoch_2.pth')['meta']['iter'] == 4
    assert 'mIoU' in tested and scores(place / 'tested')['mIoU'] == pytest.approx(first_score(trained)['mIoU'])
    names = {f'ADE_validat_{i:08d}' for i in range(2)}
    pictures = list((place / 'pictures').rglob('*.png'))
    assert {next(name for name in names if name in path.name) for path in pictures} == names
    predictions = {path.stem: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in
                   (place / 'labelled').glob('*.png')}
    assert set(predictions) == names
    assert {array.shape for array in predictions.values()} == {(80, 100), (80, 120)}
    assert all(array.min() >= 1 and array.max() <= 150 for array in predictions.values())


# Runs scripts as they lie in the installed mmseg, one after the other: argument lists on the command line, as JSON.
RUN_SCRIPTS = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words
    runpy.run_path(words[0], run_name='__main__')
"""
# mmseg's own entry to inference; it has never heard of adala_mm until it meets the backbone's type.
INFER = """
import sys
import cv2, numpy
from mmseg.apis import MMSegInferencer
assert 'mmseg.models' in sys.modules and 'adala_mm' not in sys.modules
inferencer = MMSegInferencer('dumped.py', 'flagship/epoch_1.pth', device='cpu')
assert 'adala_mm.openmmlab' in sys.modules
result = inferencer(cv2.imread(sys.argv[1]), show=False)
numpy.save('inferred.npy', result['predictions'])
"""
# mmpretrain's.
CLASSIFY = """
from mmpretrain import ImageClassificationInferencer
answer, = ImageClassificationInferencer('classifier.py', pretrained='classified/epoch_1.pth', device='cpu')(sys.argv[1])
numpy.save('classified.npy', answer['pred_scores'])
"""


def tools_of(package: str) -> Path:
    return Path(importlib.util.find_spec(package).origin).parent / '.mim/tools'


def classifier(place: Path) -> None:
    """A linear classifier of the paper, small, on 1,000 pictures of which few are used."""
    cfg = Config.fromfile(ROOT / 'configs/adala/cls_dinov2l_in1k.py')
    cfg.merge_from_dict(relocate(cfg.to_dict(), str(imagenet(place / 'classes'))))
    cfg.merge_from_dict(classifier_in1k() | epochs(1) | {'model.backbone.init_cfg': None})
    cfg.dump('classifier.py')


def test_scripts_of_mmseg_and_mmpretrain(trained, place):
    """In the environment that users have, with nothing in between: what comes first are the scripts' own imports."""
    tools, others = tools_of('mmseg'), tools_of('mmpretrain')
    classifier(place)
    repeated = Config.fromfile('dumped.py')  # the benchmark wants 200 images
    repeated.test_dataloader.dataset = dict(type='RepeatDataset', times=100, dataset=repeated.test_dataloader.dataset)
    repeated.test_dataloader.dataset.dataset.pipeline[1].scale = (256, 72)  # 72 x 90 and 72 x 108: no multiples of 16
    repeated.model.data_preprocessor.update(size=None, size_divisor=32)  # it pads as in training
    repeated.dump('repeated.py')
    image = place / 'cli_data/ade/ADEChallengeData2016/images/validation/ADE_validat_00000001.jpg'
    scripts = json.dumps([
        [str(tools / 'test.py'), 'dumped.py', 'flagship/epoch_1.pth', '--work-dir', 'mmseg_tested', '--out', 'labels'],
        [str(tools / 'analysis_tools/benchmark.py'), 'repeated.py', 'flagship/epoch_1.pth', '--work-dir', 'fps'],
        [str(tools / 'analysis_tools/browse_dataset.py'), 'dumped.py', '--output-dir', 'browsed', '--not-show'],
        [str(tools / 'train.py'), 'dumped.py', '--work-dir', 'mmseg_trained'],
    ])
    picture = place / 'classes/imagenet/val/n00000998/n00000998_0.JPEG'
    more = json.dumps([
        [str(tools / 'misc/print_config.py'), 'dumped.py', '--graph'],
        [str(tools / 'analysis_tools/get_flops.py'), 'dumped.py', '--shape', '64', '64'],
        [str(others / 'train.py'), 'classifier.py', '--work-dir', 'classified'],
        [str(others / 'test.py'), 'classifier.py', 'classified/epoch_1.pth', '--work-dir', 'classified_again',
         '--out', 'classified.pkl'],
        [str(others / 'test.py'), 'classifier.py', 'classified/epoch_1.pth', '--work-dir', 'flipped', '--tta'],
        [str(others / 'analysis_tools/get_flops.py'), 'classifier.py', '--shape', '64'],
    ])
    # MMSegInferencer is the first to import anything there; that mmpretrain can be is test_openmmlab.py's.
    second = f'{INFER}\nsys.argv[1:] = sys.argv[2:]\n{RUN_SCRIPTS}\nsys.argv[1:] = [{str(picture)!r}]\n{CLASSIFY}'
    _, out = python(['-c', RUN_SCRIPTS, scripts], ['-c', second, image, more], cwd=place)
    for key in ('mIoU', 'aAcc'):
        assert scores(place / 'mmseg_tested')[key] == pytest.approx(first_score(trained)[key])
    assert json.loads(next((place / 'fps').glob('fps_*.json')).read_text())['average_fps'] > 0
    assert len(list((place / 'browsed').glob('ADE_train*.jpg'))) == 4

    assert np.array_equal(np.load('inferred.npy') + 1,
                          cv2.imread('labels/ADE_validat_00000001.png', cv2.IMREAD_UNCHANGED))
    assert "type='adala_mm.AdaLAViT'" in out
    assert '(attn): LinearAttention' in Path('example-graph.txt').read_text()
    assert Config.fromfile('example.py').to_dict() == Config.fromfile('dumped.py').to_dict()
    assert load_checkpoint(place / 'mmseg_trained/epoch_1.pth')['meta']['iter'] == 2
    flops = [float(number) for number in re.findall(r'Flops: ([0-9.]+)', out)]
    assert len(flops) == 2 and min(flops) > 0

    assert scores(place / 'classified_again')['accuracy/top1'] == first_score(place / 'classified')['accuracy/top1']
    assert 0 <= scores(place / 'flipped')['accuracy/top1'] <= 100
    tested = {Path(sample['img_path']).name: sample['pred_score'] for sample in mmengine.load('classified.pkl')}
    np.testing.assert_allclose(np.load('classified.npy'), tested[picture.name].numpy(), rtol=1e-4)
