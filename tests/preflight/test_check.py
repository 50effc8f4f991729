"""tools/check.py: green where training would run, and one red line with its fix for what would fail."""
from __future__ import annotations

import runpy
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from adala_mm.preflight import OK, SKIPPED, WARNING, memory
from helpers import ROOT
from helpers.pictures import photo
from helpers.preflight import (
    BATCHES,
    ESTIMATE,
    HEAD_LINE,
    STAGE1,
    STAGE2,
    assert_one_red,
    check,
    classifier,
    flagship,
    red,
)
from helpers.recipes import pretrained_file, stage1, stage2


def test_a_segmentor_that_would_train(root, capsys, monkeypatch):
    monkeypatch.setattr(memory, 'estimate', ESTIMATE)
    monkeypatch.setattr(memory, 'head_line', HEAD_LINE)
    code, findings = flagship(root, '--images', 'all', **BATCHES)
    assert code == 0, red((code, findings))
    assert {'model', 'classes', 'checkpoint', 'image sizes', 'memory', 'disk', 'batch and lr', 'loops',
            'optimizer', 'schedule', 'hooks', 'processes'} | {
        f'{loader}_dataloader {what}' for loader in ('train', 'val')
        for what in ('folders', 'counts', 'images', 'labels', 'batch')} == set(findings)
    assert not [finding for group in findings.values() for finding in group if finding['status'] == SKIPPED]
    assert '2 x 3 x 64 x 64' in findings['train_dataloader batch'][0]['found']
    assert '4 of 4 looked at' in findings['train_dataloader images'][0]['found']
    assert 'about' in findings['memory'][0]['found'] and 'estimate' in findings['memory'][0]['found']
    printed = capsys.readouterr().out
    assert '\033' not in printed
    assert printed.splitlines()[-1].endswith('warning') and 'error' not in printed.splitlines()[-1]


def test_stage_1_that_would_train(root):
    weights = pretrained_file(Path('model.safetensors'))
    code, findings = check(STAGE1, '--data-root', root, '--device-memory', '1', options=stage1() | {
        'model.backbone.init_cfg.checkpoint': weights})
    assert code == 0, red((code, findings))
    assert findings['checkpoint of backbone'][0]['found'] == f'{weights} fits'
    assert findings['model'][0]['found'].endswith(
        '; backbone: 2 of 2 blocks LinearAttention; frozen attentions: 2 of 2 blocks SoftmaxAttention')
    assert findings['train_dataloader labels'] == [dict(
        name='train_dataloader labels', status=SKIPPED, found='the pipeline reads no labels', fix='')]


def test_stage_2_that_would_train(root):
    (root / 'imagenet22k').mkdir()
    photo(root / 'imagenet22k/a.JPEG')
    photo(root / 'imagenet22k/b.JPEG')
    weights = pretrained_file(Path('model.safetensors'))
    code, findings = check(STAGE2, '--data-root', root, options=stage2() | {
        f'model.{role}.init_cfg.checkpoint': weights for role in ('backbone', 'teacher')})
    assert code == 0, red((code, findings))
    assert {'checkpoint of backbone', 'checkpoint of teacher'} <= set(findings)


def test_a_classifier_that_would_train(place):
    code, findings = check(classifier(place))
    assert code == 0, red((code, findings))
    assert findings['train_dataloader labels'][0]['found'] == '3 classes occur, 1 to 1 images each'
    assert findings['classes'][0]['status'] == OK


def test_transformers_that_mmpretrain_cannot_be_imported_beside(root, monkeypatch):
    monkeypatch.setattr('adala_mm.utils.mmpretrain_compat.version', {'transformers': '5.1.0'}.__getitem__)
    _, findings = flagship(root, **BATCHES)
    assert [(f['status'], f['found'][:19]) for f in findings['libraries']] == [(WARNING, 'transformers 5.1.0:')]
    assert 'transformers<5' in findings['libraries'][0]['fix']


def test_too_little_disk(root, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(10 ** 9, 10 ** 9 - 10 ** 5, 10 ** 5))
    assert_one_red(flagship(root, **BATCHES), 'disk', '0.0 GB free', '4 checkpoints', fix='max_keep_ckpts=1')


def test_no_batch(root):
    options = {'train_dataloader.batch_size': 5}
    wrong = {finding['name']: finding for finding in red(flagship(root, **options))}
    assert 'the loader gives no batch: 4 images' in wrong['train_dataloader batch']['found']
    assert 'drop_last drops them all' in wrong['processes']['found']


def test_model_that_cannot_be_built(root):
    code, findings = flagship(root, **BATCHES, **{'model.backbone.attention.type': 'adala_mm.LinearAttn'})
    assert code == 1 and 'Did you mean adala_mm.LinearAttention?' in findings['model'][0]['found']
    assert findings['memory'][0]['status'] == SKIPPED  # told once, not five times
    assert 'LinearAttn' in findings['memory'][0]['found']


# Recipes and processes.


@pytest.mark.parametrize(('words', 'options', 'status', 'fix'), [
    (['--gpus', 8], {}, OK, ''),
    (['--gpus', 2], {'optim_wrapper.accumulative_counts': 4}, OK, ''),
    (['--gpus', 2], {'optim_wrapper.optimizer.lr': 2.5e-3}, OK, ''),
    (['--gpus', 2, '--auto-scale-lr'], {}, OK, ''),
    (['--gpus', 2], {}, WARNING, '--auto-scale-lr or --cfg-options optim_wrapper.optimizer.lr=0.0025, or keep the lr '
                                 'and set optim_wrapper.accumulative_counts=4'),
    (['--gpus', 8], {'optim_wrapper.optimizer.lr': 1e-4}, WARNING, '--cfg-options optim_wrapper.optimizer.lr=0.01'),
])
def test_batch_and_learning_rate(words, options, status, fix):
    _, findings = check(STAGE1, *words, options=stage1() | {'train_dataloader.batch_size': 32} | options)
    assert [(f['status'], f['fix']) for f in findings['batch and lr']] == [(status, fix)]


def test_processes(root):
    _, findings = flagship(root, '--gpus', 4, '--device-memory', 80, **{'train_dataloader.drop_last': False})
    found = [(f['status'], f['found']) for f in findings['processes']]
    assert (WARNING, '2 validation images for 4 processes: some repeat what others do') in found
    assert (WARNING, '1 training images for each of 4 processes, fewer than batch_size=2') in found


def test_more_processes_than_gpus(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    wrong = red(flagship(root, '--gpus', 2, **{'train_dataloader.batch_size': 1}))
    assert [f['found'] for f in wrong] == ['2 processes, but 1 GPUs are visible']
    assert '--gpus 1' in wrong[0]['fix']


def test_batch_norm_that_is_not_synchronised():
    words = 'upernet_l2vitt_ade20k', '--gpus', 8, '--device-memory', 80
    assert not [f for f in check(*words)[1]['processes'] if 'BatchNorm' in f['found']]
    _, findings = check(*words, options={'sync_bn': None})
    assert any('BatchNorm layers see 2 images' in f['found'] and 'sync_bn=torch' in f['fix']
               for f in findings['processes'])


# Every config.


@pytest.mark.parametrize('name', [
    'stage1_dinov2l_fast_coco', 'stage2_clipl_in22k', 'cls_dinov2b_in1k', 'mask2former_dinov2b_1024_cityscapes',
    'mask2former_deitt_camvid', 'stage2_deitt_caltech', 'cls_l2vitt_in1k', 'stage2_demo_beacons',
    'fcn_demo_beacons'])
def test_configs_without_data(name, monkeypatch):
    monkeypatch.setattr(memory, 'estimate', ESTIMATE)
    code, findings = check(name, '--data-root', 'nowhere', '--device-memory', 80, '--gpus', 8)
    wrong = red((code, findings))
    drawn = name == 'fcn_demo_beacons'
    assert code == 1 and ('train_dataloader folders' in {f['name'] for f in wrong}) != drawn
    for finding in wrong:
        assert finding['fix'] and 'Error' not in finding['found'].split(':')[0], finding
        if 'folders' in finding['name']:
            assert 'nowhere' in finding['found'] and '--data-root DIR' in finding['fix']
    for what in ('model', 'disk', 'batch and lr', 'memory'):
        assert findings[what][0]['status'] in (OK, WARNING), findings[what]
    if '_demo_' in name:
        assert any('run teacher_demo_beacons first' in f['fix'] and '--work-dir work_dirs/demo/teacher' in f['fix']
                   for f in wrong)


def test_scaling_a_rate_of_unknown_batch_is_refused(monkeypatch, capsys):
    config = ROOT / 'configs/real/stage1_deitt_caltech.py'
    monkeypatch.setattr(sys, 'argv', ['check.py', str(config), '--auto-scale-lr'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'tools/check.py'), run_name='__main__')
    assert end.value.code == 2
    assert f'--auto-scale-lr: {config} does not say which total batch' in capsys.readouterr().err
