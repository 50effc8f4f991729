"""check.py builds what the runner builds before the first step, for all processes, and finds what is out of place."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch.utils.data import Dataset

from adala_mm.preflight import ERROR, OK, SKIPPED, WARNING, Finding, Plan
from adala_mm.preflight.report import Skipped
from adala_mm.preflight.run import run
from adala_mm.preflight.schedule import schedule
from adala_mm.utils.cli import base_parser, load_config
from helpers import ROOT
from helpers.pictures import photo
from helpers.preflight import CLASSIFIER
from helpers.recipes import apart

IMAGES = 60
WARM_UP = dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0)
FALL = dict(type='PolyLR', power=0.9, by_epoch=False)


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Iterator[Path]:
    with apart(tmp_path_factory.mktemp('run')) as here:
        for split, count in (('train', IMAGES), ('val', 3)):
            first = photo(Path('data/pets') / split / 'kind0/0.png', 32, 32)
            for i in range(1, count):
                path = Path('data/pets') / split / f'kind{i % 3}/{i}.png'
                path.parent.mkdir(exist_ok=True)
                os.link(first, path)
        Path('pets.py').write_text(CLASSIFIER)
        yield here


def found(processes: int = 1, **changes) -> dict[str, list[Finding]]:
    """Findings of a run of 10 epochs x 30 steps, changed."""
    cfg = Config.fromfile('pets.py')
    cfg.work_dir = 'work_dirs/pets'
    cfg.merge_from_dict({'train_cfg.max_epochs': 10} | changes)
    before = sorted(Path.cwd().rglob('*'))
    findings: dict[str, list[Finding]] = {}
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        for finding in run(Plan(cfg, processes=processes)):
            findings.setdefault(finding.name, []).append(finding)
    assert sorted(Path.cwd().rglob('*')) == before  # nothing is written
    assert list(findings) == ['loops', 'optimizer', 'schedule', 'hooks']
    return findings


def test_a_run_that_is_in_order(place):
    good = found(param_scheduler=[dict(WARM_UP, end=20), dict(FALL, begin=20, end=300)])
    assert all(finding.status == OK for group in good.values() for finding in group), good
    assert good['loops'][0].found == '10 epochs x 30 = 300 steps, validation every 1 epochs'
    assert good['optimizer'][0].found.startswith('SGD, 1 groups of parameters, lr 0.1')
    assert good['schedule'][0].found == 'LinearLR 0 to 20 of 300 steps, PolyLR 20 to 300 of 300 steps'
    assert found()['schedule'][0].found == 'the learning rate is constant'


@pytest.mark.parametrize(('processes', 'batch', 'steps'), [(1, 2, 30), (8, 8, 1), (2, 8, 4), (4, 1, 15)])
def test_epochs_of_few_steps(processes, batch, steps, place):
    """60 images on 8 processes of 8 images are one step: ceil(ceil(60 / 8) / 8)."""
    (finding,) = found(processes, **{'train_dataloader.batch_size': batch})['loops']
    if steps >= 10:
        assert finding.status == OK and f'10 epochs x {steps} = {10 * steps} steps' in finding.found
    else:
        assert finding.status == WARNING and finding.found == (
            f'an epoch is {steps} step{"s" * (steps > 1)}, the run {10 * steps}: 60 images for {processes} processes x '
            f'{batch}')
        assert 'train_dataloader.batch_size' in finding.fix


@pytest.mark.parametrize(('processes', 'schedulers', 'status', 'words'), [
    # What the runner itself refuses to build.
    (1, [dict(WARM_UP, end=300), dict(FALL, begin=300, end=300)], ERROR, 'end should be larger than begin'),
    (1, [dict(WARM_UP, end=0)], ERROR, 'end should be larger than begin'),
    (1, [dict(FALL, begin=400)], ERROR, 'end should be larger than begin'),  # its end is that of the run
    (1, [dict(type='PolyLr')], ERROR, 'PolyLr is not in the'),
    (1, [dict(type='PolyLR', pwer=1)], ERROR, 'pwer'),
    (1, [dict(FALL, convert_to_iter_based=True)], ERROR, 'epoch-based'),
    # What it builds, and what does not do what was meant.
    (1, [dict(WARM_UP, end=300)], WARNING, 'the warm-up (LinearLR) takes 300 of 300 steps'),
    (1, [dict(WARM_UP, end=151)], WARNING, 'the warm-up (LinearLR) takes 151 of 300 steps: more than half'),
    (1, [dict(WARM_UP, end=150)], OK, ''),
    (4, [dict(WARM_UP, end=100)], WARNING, 'takes 100 of 80 steps'),  # 15 images each are 8 steps
    (1, [dict(FALL, end=200)], WARNING, 'PolyLR ends at 200 of 300 steps: the lr stays as it is from then on'),
    (1, [dict(FALL, end=400)], WARNING, 'PolyLR ends at 400, but the run has 300 steps: the lr never reaches'),
    (1, [dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, end=7)], WARNING,
     'CosineAnnealingLR ends at 210 of 300 steps'),
    (1, [dict(type='CosineAnnealingLR', by_epoch=True, end=12)], WARNING, 'ends at 12, but the run has 10 epochs'),
    (1, [dict(FALL, end=200), dict(type='ConstantLR', factor=1.0, by_epoch=False, begin=200)], OK, ''),
    (1, [dict(type='MultiStepLR', milestones=[5, 8, 11], by_epoch=True)], WARNING,
     'milestones 11 of MultiStepLR never come: the run has 10 epochs'),
    (1, [dict(type='MultiStepLR', milestones=[200, 20000], by_epoch=False)], WARNING, 'milestones 20000'),
    (1, [dict(type='MultiStepLR', milestones=[5, 8], by_epoch=True)], OK, ''),
    (1, [dict(type='LinearLR', start_factor=1.0, end_factor=0.1, by_epoch=False, end=300)], OK, ''),  # falls
    (1, [dict(FALL, begin=500, end=900)], WARNING, 'PolyLR begins at 500, but the run has 300 steps'),
])
def test_schedules(processes, schedulers, status, words, place):
    findings = found(processes, param_scheduler=schedulers)['schedule']
    assert [finding.status for finding in findings] == [status], findings
    assert words in findings[0].found and bool(findings[0].fix) == (status != OK)


@pytest.mark.parametrize(('changes', 'name', 'status', 'words'), [
    ({'optim_wrapper.optimizer.type': 'AdamX'}, 'optimizer', ERROR, 'TypeError'),  # MMEngine says no more
    ({'optim_wrapper.optimizer.learning_rate': 1}, 'optimizer', ERROR, 'learning_rate'),
    ({'optim_wrapper.paramwise_cfg': {'custom_keys': []}}, 'optimizer', ERROR, 'custom_keys'),
    ({'optim_wrapper.constructor': 'adala_mm.Nothing'}, 'optimizer', ERROR, 'Nothing'),
    ({'train_cfg.max_epoch': 3}, 'loops', ERROR, 'max_epoch'),
    ({'val_evaluator': {'type': 'Acuracy'}}, 'loops', ERROR, 'Acuracy'),
    ({'val_evaluator': None}, 'loops', ERROR, 'the config has no val_evaluator'),
    ({'train_cfg.val_interval': 11}, 'loops', WARNING, 'val_interval=11, but the run has 10 epochs: it validates at'),
    ({'train_cfg.val_begin': 11}, 'loops', WARNING, 'it never validates'),
    ({'default_hooks': {'checkpoint': {'type': 'CheckpointHook', 'interval': 20}}}, 'hooks', WARNING,
     'CheckpointHook saves every 20 epochs, and the run has 10: at its end only'),
    ({'default_hooks': {'checkpoint': {'type': 'CheckpointHook', 'by_epoch': False, 'interval': 500,
                                       'save_last': False}}}, 'hooks', WARNING, 'the run has 300: nothing is saved'),
    ({'custom_hooks': [{'type': 'NoHook'}]}, 'hooks', ERROR, 'NoHook'),
    ({'custom_hooks': [{'type': 'EMAHook', 'momentum': 3}]}, 'hooks', OK, 'all of them can be built'),
])
def test_parts(changes, name, status, words, place):
    findings = found(**changes)
    (finding,) = findings.pop(name)
    assert finding.status == status and words in finding.found, finding
    assert bool(finding.fix) == (status != OK)
    broken = status == ERROR and name in ('loops', 'optimizer')  # told once, and not by what builds on it
    others = {key: finding.status for key, (finding,) in findings.items()}
    assert others.pop('schedule', OK) in ((SKIPPED, OK) if broken else (OK,))
    assert set(others.values()) == {OK}


@pytest.mark.parametrize('kind', ['adala_mm.StopOnPlateauHook', 'EarlyStoppingHook'])
def test_early_stopping_without_validation(kind, place):
    monitor = {'accuracy/top1': 'greater'} if kind.startswith('adala') else 'accuracy/top1'
    changes = dict(custom_hooks=[dict(type=kind, monitor=monitor)])
    assert found(**changes)['hooks'][0].status == OK
    (finding,) = found(val_dataloader=None, val_cfg=None, val_evaluator=None, **changes)['hooks']
    assert finding.status == ERROR and 'decides by held-out scores' in finding.found


def test_best_weights_without_validation(place):
    hook = dict(checkpoint=dict(type='CheckpointHook', interval=1, save_best='accuracy/top1'))
    (finding,) = found(val_dataloader=None, val_cfg=None, val_evaluator=None, default_hooks=hook)['hooks']
    assert finding.status == WARNING and 'keeps the best accuracy/top1' in finding.found


def test_runs_of_iterations(place):
    loop = dict(type='IterBasedTrainLoop', max_iters=40, val_interval=50)
    findings = found(train_cfg=dict(loop, _delete_=True), param_scheduler=[dict(FALL, end=80)])
    assert findings['loops'][0].found == 'val_interval=50, but the run has 40 iterations: it validates at its end only'
    assert 'PolyLR ends at 80, but the run has 40 steps' in findings['schedule'][0].found
    assert findings['hooks'][0].found == 'CheckpointHook counts epochs, and the run counts iterations'
    assert findings['hooks'][0].status == WARNING


def test_rates_scaled_to_the_batch(place):
    scale = dict(auto_scale_lr=dict(enable=True, base_batch_size=4))
    assert 'lr 0.05' in found(1, **scale)['optimizer'][0].found
    assert 'lr 0.2' in found(4, **scale)['optimizer'][0].found


class Listed(Dataset):
    """As many images as ADE20K has."""

    metainfo = dict(classes=('thing',))

    def __len__(self) -> int:
        return 20210


@pytest.mark.parametrize('name', ['stage2_dinov2l_fsdp_in22k', 'stage2_dinov2l_earlystop_in22k', 'cls_l2vitt_in1k',
                                  'mask2former_dinov2b_ade20k', 'upernet_l2vitt_ade20k', 'stage2_demo_beacons',
                                  'calibrate_dinov2l_plus_coco', 'calibrate_deitt_plus_caltech',
                                  'calibrate_dinov2b_coarse_coco', 'stage1_clipl_coarse_coco'])
def test_recipes_of_this_repository_are_in_order(name, monkeypatch):
    monkeypatch.setattr(Plan, 'dataset', lambda self, loader: Listed())
    (path,) = ROOT.glob(f'configs/*/{name}.py')
    cfg = load_config(base_parser('').parse_args([str(path)]))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        findings = list(run(Plan(cfg, processes=8)))
    assert [(finding.name, finding.status) for finding in findings] == [
        (part, OK) for part in ('loops', 'optimizer', 'schedule', 'hooks')], findings


def test_a_rate_says_nothing_of_calibration():
    with pytest.raises(Skipped, match='no steps'):
        list(schedule(Plan(Config.fromfile(ROOT / 'configs/real/calibrate_deitt_plus_caltech.py'))))


def test_what_needs_data_is_skipped_without_it(place):
    findings = found(**{'train_dataloader.dataset.data_root': 'nowhere', 'val_dataloader.dataset.data_root': 'nowhere'})
    assert [findings[name][0].status for name in findings] == [SKIPPED, OK, SKIPPED, OK], findings
