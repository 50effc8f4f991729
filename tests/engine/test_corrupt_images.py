"""Images that cannot be read are counted, listed, and stop a run when they are too many."""
from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmpretrain.structures import DataSample

from adala_mm.engine import CorruptImagesHook
from adala_mm.utils.checkpoint import load_checkpoint
from helpers import LINEAR, ROOT, tiny_vit
from helpers.photographs import KINDS, SPOILT, name_of, of_each_kind, spoilt
from helpers.processes import put_back


class Log(list):
    warning = list.append


def fake_runner(work_dir: Path) -> SimpleNamespace:
    return SimpleNamespace(work_dir=str(work_dir), logger=Log(), hooks=[])


@pytest.mark.parametrize('kind', [list, tuple])
def test_views_of_test_time_augmentation_count_once(kind, tmp_path):
    hook, runner = CorruptImagesHook(), fake_runner(tmp_path)
    hook.before_run(runner)
    samples = batch({}, {'a.jpg': 'truncated'}, {})['data_samples']
    hook.after_test_iter(runner, 0, dict(data_samples=[kind(samples), kind(samples)]))  # of each of two views, a batch
    hook.after_test_epoch(runner)
    assert (hook.drawn, hook.replaced) == (3, 1)


def batch(*corrupt: dict) -> dict:
    return dict(data_samples=[DataSample(metainfo=dict(corrupt=notes) if notes else {}) for notes in corrupt])


def test_hook_counts_and_lists(tmp_path):
    runner, hook = fake_runner(tmp_path), CorruptImagesHook(interval=2)
    hook.before_run(runner)
    hook.after_train_iter(runner, 0, batch({'a.jpg': 'no whole image'}, {}))
    assert not runner.logger and not hook.path.exists()  # a look every other iteration
    hook.after_train_iter(runner, 1, batch({}, {'a.jpg': 'no whole image', 'b.jpg': 'the shard ends'}))
    assert hook.path.read_text() == 'a.jpg\tno whole image\nb.jpg\tthe shard ends\n'
    (line,) = runner.logger
    assert line.startswith('2 of 4 images drawn were unreadable and skipped (50 %), listed in ')
    assert 'a.jpg (no whole image), b.jpg (the shard ends)' in line and str(hook.path) in line
    hook.after_train_iter(runner, 2, batch({'c.jpg': 'no whole image'}))
    hook.after_train_epoch(runner)
    assert len(runner.logger) == 3 and runner.logger[-1].startswith('3 of 5 images drawn were unreadable')
    assert hook.path.read_text().endswith('\nc.jpg\tno whole image\n')


def test_hook_takes_names_that_are_no_utf8(tmp_path):
    runner, hook = fake_runner(tmp_path), CorruptImagesHook(interval=1)
    hook.before_run(runner)
    hook.after_train_iter(runner, 0, batch({os.fsdecode(b'\xff.jpg'): 'no whole image'}))
    assert hook.path.read_bytes() == b'\xff.jpg\tno whole image\n'
    assert r'\udcff.jpg (no whole image)' in runner.logger[0] and runner.logger[0].encode()  # as logs do


def test_hook_lists_each_image_once(tmp_path):
    for _ in range(2):  # a resumed run
        runner, hook = fake_runner(tmp_path), CorruptImagesHook(interval=1)
        hook.before_run(runner)
        for i in range(2):
            hook.after_val_iter(runner, i, batch({'a.jpg': 'no whole image'}))
    assert hook.path.read_text() == 'a.jpg\tno whole image\n'
    assert hook.replaced == 2


def test_hook_is_quiet_about_whole_images_and_other_data(tmp_path):
    runner, hook = fake_runner(tmp_path), CorruptImagesHook(interval=1)
    hook.before_run(runner)
    for i, data in enumerate([batch({}, {}), dict(inputs=torch.zeros(1)), None, (1, 2)]):
        hook.after_train_iter(runner, i, data)
    hook.after_train_epoch(runner)
    hook.after_train(runner)
    assert not runner.logger and not hook.path.exists()


@pytest.mark.parametrize(('max_corrupt', 'allowed'), [(0, 0), (0.002, 2), (0.01, 10)])
def test_hook_stops_a_run_with_too_many(tmp_path, max_corrupt, allowed):
    runner, hook = fake_runner(tmp_path), CorruptImagesHook(max_corrupt, interval=1)
    hook.before_run(runner)
    for i in range(allowed):
        hook.after_train_iter(runner, i, batch({f'{i}.jpg': 'no whole image'}))
    with pytest.raises(ValueError) as info:
        hook.after_train_iter(runner, allowed, batch({f'{allowed}.jpg': 'no whole image'}))
    assert f'more than max_corrupt={max_corrupt:g} allows: 0.jpg (no whole image)' in str(info.value)
    assert ('and 8 more' in str(info.value)) == (allowed == 10)
    assert len(hook.path.read_text().splitlines()) == allowed + 1


def test_hook_goes_by_the_share_later_on(tmp_path):
    runner, hook = fake_runner(tmp_path), CorruptImagesHook(0.01, interval=1)
    hook.before_run(runner)
    hook.drawn = 1988
    for i in range(20):
        hook.after_train_iter(runner, i, batch({f'{i}.jpg': 'no whole image'}))
    with pytest.raises(ValueError, match=r'21 of 2,009 images drawn were unreadable and skipped \(1 %\)'):
        hook.after_train_iter(runner, 20, batch({'20.jpg': 'no whole image'}))


def test_hook_of_two_processes(tmp_path, monkeypatch):
    """Both see the sum, so both stop at the same step; one writes."""
    others = (3, [{'theirs.jpg': 'no whole image'}])
    monkeypatch.setattr('adala_mm.engine.corrupt_images.all_gather_object', lambda own: [others, own])
    for main in (False, True):
        monkeypatch.setattr('adala_mm.engine.corrupt_images.is_main_process', lambda main=main: main)
        runner, hook = fake_runner(tmp_path), CorruptImagesHook(0, interval=1)
        hook.before_run(runner)
        with pytest.raises(ValueError, match='2 of 4 images drawn were unreadable'):
            hook.after_train_iter(runner, 0, batch({'ours.jpg': 'no whole image'}))
        assert hook.path.exists() == main
    assert len(hook.path.read_text().splitlines()) == 2


def test_hook_goes_on_counting_after_a_resume(tmp_path):
    checkpoint = {}
    for resume in (True, False):
        saved, hook = CorruptImagesHook(0.002, interval=1), CorruptImagesHook(0.002, interval=1)
        runner = fake_runner(tmp_path)
        runner._resume = resume
        saved.before_run(runner)
        for i in range(2):
            saved.after_train_iter(runner, i, batch({f'{i}.jpg': 'no whole image'}, {}))
        saved.before_save_checkpoint(runner, checkpoint)
        torch.save(checkpoint, tmp_path / 'saved.pth')
        hook.before_run(runner)
        hook.after_load_checkpoint(runner, load_checkpoint(tmp_path / 'saved.pth'))
        if resume:
            with pytest.raises(ValueError, match='3 of 5 images drawn were unreadable'):
                hook.after_train_iter(runner, 0, batch({'2.jpg': 'no whole image'}))
        else:  # a new run that only starts from the weights
            hook.after_train_iter(runner, 0, batch({'2.jpg': 'no whole image'}))
            assert (hook.replaced, hook.drawn) == (1, 1)
    CorruptImagesHook().after_load_checkpoint(SimpleNamespace(_resume=True), {})  # of before these numbers were kept


@pytest.mark.parametrize('share', [-0.1, 1.5])
def test_hook_takes_a_share(share):
    with pytest.raises(ValueError, match=f'max_corrupt={share} is no share'):
        CorruptImagesHook(share)


# ---- runs


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where runs write; what they leave in the process is put back."""
    put_back(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage1(root: Path, kind: str, pretrained: dict, workers: int = 0, stage: str = 'stage1_dinov2l_coco') -> Config:
    cfg = Config.fromfile(ROOT / f'configs/adala/{stage}.py')
    cfg.model.backbone = tiny_vit(attention=LINEAR, init_cfg=pretrained)
    if 'teacher' in cfg.model:
        cfg.model.teacher = tiny_vit(init_cfg=pretrained)
    cfg.train_dataloader.update(batch_size=2, num_workers=workers, persistent_workers=False)
    cfg.train_dataloader.dataset.update(data_root=str(root), data_prefix='images', **KINDS[kind])
    cfg.train_dataloader.dataset.pipeline[1].scale = 32
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.logger.interval = 1
    cfg.log_processor.by_epoch = False
    cfg.work_dir = f'work_dirs/{stage}_{kind}_{workers}'
    cfg.experiment_name = cfg.visualizer.name = f'{root.name}_{kind}_{workers}'
    return cfg


def losses(cfg: Config) -> list[float]:
    Runner.from_cfg(cfg).train()
    (log,) = Path(cfg.work_dir).glob('*/vis_data/scalars.json')
    return [json.loads(line)['loss'] for line in log.read_text().splitlines()]


@pytest.mark.parametrize('stage', ['stage1_dinov2l_coco', 'stage2_dinov2l_in22k'])
def test_configs_train_on_each_kind(photos, place, pretrained, stage):
    runs = [losses(stage1(photos, kind, pretrained, stage=stage)) for kind in KINDS]
    assert len(runs[0]) == 2 and all(np.isfinite(runs[0])) and runs[0] == runs[1] == runs[2]
    assert len(list(place.glob('work_dirs/indices/*.txt'))) == 3 * ('in22k' in stage)
    assert not list(place.glob('work_dirs/*/corrupt_images.txt'))


@of_each_kind
def test_run_with_unreadable_images(place, pretrained, kind):
    cfg = stage1(spoilt(place / 'data', SPOILT['truncated'], 1, 4), kind, pretrained, workers=2)
    cfg.train_cfg.max_iters = 3  # all six images
    assert len(losses(cfg)) == 3
    lines = Path(cfg.work_dir, 'corrupt_images.txt').read_text().splitlines()
    assert sorted(name_of(line.split('\t')[0]) for line in lines) == ['1.jpg', '4.jpg']
    (log,) = Path(cfg.work_dir).glob('*/*.log')
    assert '2 of 6 images drawn were unreadable and skipped (33 %), listed in ' in log.read_text()


def test_run_with_too_many_unreadable_images(place, pretrained):
    cfg = stage1(spoilt(place / 'data', b'', 1, 4), 'folder', pretrained, workers=2)
    cfg.train_cfg.max_iters = 3
    cfg.default_hooks.corrupt.max_corrupt = 0
    with pytest.raises(ValueError, match=r'^2 of 6 images drawn .*\d.jpg \(the file is empty\).*Mend the data'):
        losses(cfg)
