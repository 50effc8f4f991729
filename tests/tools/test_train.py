"""tools/train.py and test.py: what a user gets wrong ends in one error that names it and what to do about it."""
from __future__ import annotations

import collections
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adala_mm.utils.cli import find_config
from helpers import ROOT
from helpers.pictures import ade20k, coco, imagenet, labels, photo
from helpers.recipes import (
    FLAGSHIP,
    apart,
    arguments,
    classifier_in1k,
    epochs,
    mask2former,
    pretrained_file,
    stage1,
    stage2,
)

STAGE1, STAGE2, CLASSIFIER = 'stage1_dinov2l_coco', 'stage2_dinov2l_in22k', 'cls_dinov2l_in1k'
# Random weights, where weights are not what a test is about.
UNTRAINED = {'model.backbone.init_cfg': None}
SMALL = {STAGE1: stage1(), STAGE2: stage2(), FLAGSHIP: mask2former() | UNTRAINED,
         CLASSIFIER: classifier_in1k() | UNTRAINED}


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """Complete data sets, for tests of other things."""
    root = tmp_path_factory.mktemp('data')
    photo(root / 'imagenet22k/n00004475/a.JPEG')
    photo(root / 'imagenet22k/n00004475/b.JPEG')
    return imagenet(coco(ade20k(root, train=2, val=1)))


@pytest.fixture(autouse=True)
def place(tmp_path, data, monkeypatch) -> Iterator[Path]:
    """Runs happen in the test's own folder; the pretrained model stands in the place of timm's."""
    weights = data / 'model.safetensors'
    if not weights.exists():
        pretrained_file(weights)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda repository, name: str(weights))
    with apart(tmp_path):
        yield tmp_path


def tool(name: str, config: str, root: Path, options: dict | None = None, *words: str | Path) -> None:
    """tools/<name>.py with a recipe, made small, from the command line on, but in this process."""
    path = next(ROOT.glob(f'configs/*/{config}.py'))
    options = SMALL.get(config, {}) | (options or {})
    line = [f'tools/{name}.py', path, *words, '--data-root', root, *(['--cfg-options'] if options else []),
            *arguments(options)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [str(word) for word in line])
        runpy.run_path(str(ROOT / f'tools/{name}.py'), run_name='__main__')


def assert_names(info: pytest.ExceptionInfo, *words: object) -> None:
    """The message of the error has all ``words``."""
    missing = [str(word) for word in words if str(word) not in str(info.value)]
    assert not missing, f'{missing} not in: {info.value}'


def truncated(path: Path) -> Path:
    torch.save({'state_dict': {'backbone.pos_embed': torch.ones(1000)}, 'meta': {}}, path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def test_these_command_lines_work(data):
    # What the tests below run, but for the one thing that each of them gets wrong.
    tool('train', STAGE1, data, {'train_cfg.max_epochs': 1})
    tool('train', STAGE2, data, epochs(1) | {'model.backbone.init_cfg.checkpoint': f'work_dirs/{STAGE1}/epoch_1.pth'})
    tool('train', FLAGSHIP, data, epochs(1))
    tool('test', FLAGSHIP, data, {}, f'work_dirs/{FLAGSHIP}/epoch_1.pth')
    tool('train', CLASSIFIER, data, epochs(1))
    assert len(list(Path('work_dirs').glob('*/epoch_1.pth'))) == 4


@pytest.mark.parametrize('name', ['train', 'test', 'check'])
def test_missing_config(name, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [name, 'configs/adala/mask2former.py', *(['a.pth'] if name == 'test' else [])])
    with pytest.raises(SystemExit, match='^error: no config at configs/adala/mask2former.py'):
        runpy.run_path(str(ROOT / f'tools/{name}.py'), run_name='__main__')


@pytest.mark.parametrize('name', [
    'stage1_demo_beacons', 'stage1_demo_beacons.py', 'demo/stage1_demo_beacons', 'configs/demo/stage1_demo_beacons.py',
    'adala_mm::demo/stage1_demo_beacons.py'])
def test_configs_have_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == ROOT / 'configs/demo/stage1_demo_beacons.py'
    (tmp_path / 'stage1_demo_beacons.py').touch()
    assert name != 'stage1_demo_beacons.py' or find_config(name) == Path(name)


def test_a_config_in_a_folder_of_ones_own_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'no config at mine/stage1_demo_beacons\.py, and adala_mm has none of '
                                                'that name; names like it: stage1_demo_beacons, '):
        find_config('mine/stage1_demo_beacons.py')


@pytest.mark.parametrize(('name', 'config', 'absent', 'loader'), [
    ('train', STAGE1, 'coco', 'train_dataloader'),
    ('train', STAGE1, 'coco/train2017', 'train_dataloader'),
    ('train', STAGE2, 'imagenet22k', 'train_dataloader'),
    ('train', CLASSIFIER, 'imagenet', 'train_dataloader'),
    ('train', 'mask2former_dinov2l_cityscapes', 'cityscapes', 'train_dataloader'),
    ('train', 'stage1_deitt_caltech', 'caltech101/unlabelled.txt', 'train_dataloader'),
    ('train', FLAGSHIP, 'ade/ADEChallengeData2016/annotations/training', 'train_dataloader'),
    ('train', FLAGSHIP, 'ade/ADEChallengeData2016/images/validation', 'val_dataloader'),
    ('test', FLAGSHIP, 'ade/ADEChallengeData2016/images/validation', 'test_dataloader'),
])
def test_missing_data(name, config, absent, loader, place):
    root = place / 'elsewhere'
    for folder in ('coco', 'caltech101'):
        (root / folder).mkdir(parents=True)
    ade20k(root)
    path = root / absent
    if path.is_dir():
        shutil.rmtree(path)
    with pytest.raises(SystemExit) as info:
        tool(name, config, root, {}, *(['any.pth'] if name == 'test' else []))
    assert_names(info, f'{loader}: {path} does not exist.', '--data-root DIR',
                 f'--cfg-options {loader}.dataset.data_root=DIR', 'configs/adala/README.md')
    assert (ROOT / 'configs/adala/README.md').is_file()


def test_the_advice_on_missing_data_helps(data, place):
    path = data / 'coco'
    with pytest.raises(SystemExit):
        tool('train', STAGE1, place)
    tool('train', STAGE1, place, {'train_cfg.max_epochs': 1, 'train_dataloader.dataset.data_root': path})
    assert Path(f'work_dirs/{STAGE1}/epoch_1.pth').is_file()


def test_unknown_attention(data):
    with pytest.raises(ValueError) as info:
        tool('train', STAGE1, data, {'model.backbone.attention.type': 'adala_mm.LinearAttn'})
    assert_names(info, "unknown attention type 'adala_mm.LinearAttn'", 'Did you mean adala_mm.LinearAttention?',
                 'adala_mm.SoftmaxAttention')


def test_unknown_feature_map(data):
    with pytest.raises(ValueError) as info:
        tool('train', FLAGSHIP, data, {'model.backbone.attention.feature_map': 'elu2'})
    assert_names(info, "unknown feature_map 'elu2'", 'elu1, relu')


class Forged:
    """An object that is called when it is unpickled."""

    def __reduce__(self):
        return collections.deque, ()


@pytest.mark.parametrize(('use', 'forged'), [('init_cfg', False), ('test', False), ('resume', False),
                                             ('auto resume', False), ('test', True), ('resume', True),
                                             ('load_from', True)])
def test_unreadable_checkpoint(use, forged, data, place):
    path = truncated(place / 'half.pth')
    if forged:
        torch.save({'state_dict': {}, 'message_hub': Forged()}, path)
    with pytest.raises(SystemExit) as info:
        if use == 'init_cfg':
            tool('train', STAGE1, data, {'model.backbone.init_cfg.checkpoint': path})
        elif use == 'test':
            tool('test', FLAGSHIP, data, {}, path)
        elif use == 'resume':
            tool('train', STAGE1, data, {}, '--resume', path)
        elif use == 'load_from':
            tool('train', STAGE1, data, {'load_from': path})
        else:
            work_dir = place / 'work_dirs' / STAGE1
            work_dir.mkdir(parents=True)
            (work_dir / 'last_checkpoint').write_text(str(path))
            tool('train', STAGE1, data, {}, '--resume')
    assert_names(info, f'error: cannot read the checkpoint {path}', 'never unpickled' if forged else 'truncated')


@pytest.mark.parametrize('use', ['init_cfg', 'test', 'resume'])
def test_missing_checkpoint(use, data, place):
    path = place / 'absent.pth'
    with pytest.raises(SystemExit) as info:
        if use == 'init_cfg':
            tool('train', STAGE1, data, {'model.backbone.init_cfg.checkpoint': path})
        elif use == 'test':
            tool('test', FLAGSHIP, data, {}, path)
        else:
            tool('train', STAGE1, data, {}, '--resume', path)
    assert_names(info, f'no checkpoint at {path}', 'check the path')


def test_stage_2_before_stage_1(data):
    with pytest.raises(SystemExit) as info:
        tool('train', STAGE2, data)
    assert_names(info, f'no checkpoint at work_dirs/{STAGE1}/epoch_4.pth', 'run the stage that writes it first')


@pytest.mark.parametrize(('config', 'role'), [(STAGE1, 'backbone'), (STAGE2, 'backbone'), (STAGE2, 'teacher')])
def test_alignment_without_pretrained_weights(config, role, data):
    options = {} if config == STAGE1 else {
        f'model.{vit}.init_cfg.checkpoint': 'timm://vit_large_patch14_dinov2.lvd142m' for vit in ('backbone', 'teacher')
        if vit != role}
    with pytest.raises(ValueError) as info:
        tool('train', config, data, options | {f'model.{role}.init_cfg': None})
    assert_names(info, f'the {role} has no pretrained weights', "init_cfg=dict(type='Pretrained', checkpoint=...)")


def test_label_beyond_the_classes_in_segmentation(place):
    root = ade20k(place / 'spoilt', train=2)
    folder = root / 'ade/ADEChallengeData2016'
    labels(folder / 'annotations/training/ADE_train_00000001.png', [3, 180], 80, 120)
    with pytest.raises(ValueError) as info:
        tool('train', FLAGSHIP, root, {'train_dataloader.dataset.pipeline.2.scales': [64]})
    # The data set takes 0 for "unlabelled" and counts from 1.
    assert_names(info, folder / 'images/training/ADE_train_00000001.jpg', 'label 179', 'num_classes=150',
                 'reduce_zero_label')


def test_label_beyond_the_classes_in_classification(data):
    with pytest.raises(ValueError) as info:
        tool('train', CLASSIFIER, data, {'model.head.num_classes': 400, 'train_dataloader.dataset.indices': [3, 666]})
    assert_names(info, data / 'imagenet/train/n00000666/n00000666_0.JPEG', 'label 666', 'num_classes=400')


@pytest.mark.parametrize('options', [
    {'model.backbone.img_size': 60},
    {'train_dataloader.dataset.pipeline.3.crop_size': (60, 60), 'model.data_preprocessor.size': (60, 60)},
], ids=['config', 'crop'])
def test_image_that_the_patch_does_not_divide(options, data):
    with pytest.raises(ValueError) as info:
        tool('train', FLAGSHIP, data, options)
    assert_names(info, 'image of 60 x 60 pixels cannot be cut into patches of 16', 'resize, crop or pad it',
                 '64 x 64')


def test_unreadable_image(place):
    path = ade20k(place / 'spoilt', train=2) / 'ade/ADEChallengeData2016/images/training/ADE_train_00000000.jpg'
    path.write_bytes(b'<html>404 Not Found</html>')
    with pytest.raises(AssertionError, match=re.escape(f'failed to load image: {path}')):
        tool('train', FLAGSHIP, place / 'spoilt')


def test_empty_data_folder(place):
    ade20k(place)
    for file in (place / 'ade/ADEChallengeData2016/images/validation').iterdir():
        file.unlink()
    with pytest.raises(SystemExit, match='images/validation is empty.*--data-root DIR'):
        tool('train', FLAGSHIP, place, {})


def test_imagenet_without_its_split(place):
    imagenet(place)
    shutil.rmtree(place / 'imagenet/val')
    with pytest.raises(SystemExit, match='val_dataloader: .*imagenet/val does not exist'):
        tool('train', CLASSIFIER, place, {})


def test_scaling_a_rate_of_unknown_batch_is_refused(tmp_path, monkeypatch, capsys):
    config = tmp_path / 'no_batch.py'
    config.write_text('optim_wrapper = dict(optimizer=dict(lr=1.0))')
    monkeypatch.setenv('LOCAL_RANK', '0')  # the tool sets it and leaves it
    monkeypatch.setattr(sys, 'argv', ['train.py', str(config), '--auto-scale-lr'])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / 'tools/train.py'), run_name='__main__')
    assert 'add auto_scale_lr = dict(enable=False, base_batch_size=...)' in capsys.readouterr().err
