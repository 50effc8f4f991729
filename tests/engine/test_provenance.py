"""Equal runs are bitwise equal, and every run says what it was: code, config, seed, weights and how it ended."""
from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from PIL import Image

from adala_mm.datasets.beacons import draw_scene
from adala_mm.engine import ProvenanceHook, provenance
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import checkpoint_sha256, load_checkpoint
from adala_mm.utils.fingerprint import file_sha256, fingerprint
from adala_mm.utils.machine import git_state
from helpers import ROOT
from helpers.processes import put_back

STEPS = 6


@HOOKS.register_module()
class EndOfRun(Hook):
    """Raises ``error`` after that many iterations."""

    def __init__(self, after: int, error: str) -> None:
        self.after, self.error = after, dict(KeyboardInterrupt=KeyboardInterrupt, ValueError=ValueError)[error]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after:
            raise self.error('something is wrong:\nwith details')


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """Images, weights, and a config that trains on them with augmentation in two workers, saving twice."""
    place = tmp_path_factory.mktemp('provenance')
    for split, count in (('train', 8), ('val', 2)):
        for kind in ('images', 'labels'):
            (place / 'scenes' / kind / split).mkdir(parents=True)
        for i in range(count):
            image, label = draw_scene(np.random.default_rng(i))
            Image.fromarray(image).save(place / f'scenes/images/{split}/{i}.png')
            Image.fromarray(label).save(place / f'scenes/labels/{split}/{i}.png')
    cfg = Config.fromfile(ROOT / 'configs/demo/teacher_demo_beacons.py')
    for loader, split in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        loading = cfg[f'{loader}_dataloader']
        loading.batch_size = 2
        loading.dataset = dict(
            type='BaseSegDataset', data_root=str(place / 'scenes'), img_suffix='.png', seg_map_suffix='.png',
            data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}'), reduce_zero_label=False,
            metainfo=dict(classes=list('abcdef')), pipeline=loading.dataset.pipeline)
    cfg.train_dataloader.update(num_workers=2, persistent_workers=True)
    cfg.model.backbone.update(depth=1, embed_dim=24)
    cfg.model.decode_head.update(in_channels=24, channels=24)
    torch.manual_seed(5)
    torch.save(MODELS.build(cfg.model.backbone).state_dict(), place / 'start.pth')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(place / 'start.pth'))
    cfg.merge_from_dict({'train_cfg.max_iters': STEPS, 'train_cfg.val_interval': 3, 'optim_wrapper.optimizer.lr': 0.01,
                         'default_hooks.checkpoint.interval': 3, 'default_hooks.logger.interval': 1})
    cfg.dump(place / 'tiny.py')
    return place


@contextlib.contextmanager
def fresh_process() -> Iterator[pytest.MonkeyPatch]:
    """What a run leaves in its process is put back."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        put_back(patch)
        patch.setattr(torch.backends.cudnn, 'benchmark', torch.backends.cudnn.benchmark)
        patch.setattr(torch.backends.cudnn, 'deterministic', torch.backends.cudnn.deterministic)
        for name in ('CUBLAS_WORKSPACE_CONFIG', 'LOCAL_RANK'):  # set by the tool
            patch.setenv(name, '')
            patch.delenv(name)
        # Workers that are collected with their loader look this often, in seconds, whether they should end.
        for module in ('', '.worker'):
            patch.setattr(f'torch.utils.data._utils{module}.MP_STATUS_CHECK_INTERVAL', 0.1)
        torch.set_num_threads(1)
        try:
            yield patch
        finally:
            gc.collect()
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)


def train(place: Path, name: str, *words: str) -> Path:
    """tools/train.py in this process; the work dir."""
    spec = importlib.util.spec_from_file_location('tool_train', ROOT / 'tools/train.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with fresh_process() as patch:
        patch.setattr(sys, 'argv', ['train.py', str(place / 'tiny.py'), '--work-dir', str(place / name), *words])
        tool.main()
    return place / name


def ending(**how) -> list[str]:
    """Options that put `EndOfRun` into the place of a hook that a training does not need."""
    return [f'default_hooks.visualization.{key}={value}' for key, value in dict(type='EndOfRun', **how).items()]


def starts(run: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(run.glob('*/run*.json'))]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope='module')
def run(place) -> Path:
    return train(place, 'first', '--seed', '3', '--deterministic')


def weights(run: Path) -> dict:
    return load_checkpoint(run / f'iter_{STEPS}.pth')['state_dict']


def test_equal_runs_are_bitwise_equal(place, run):
    again = weights(train(place, 'again', '--seed', '3', '--deterministic'))
    first = weights(run)
    assert again.keys() == first.keys()
    for key, value in first.items():
        assert torch.equal(again[key], value), key
    other = weights(train(place, 'other', '--seed', '4', '--deterministic'))
    assert not any(torch.equal(other[key], value) for key, value in first.items() if key.endswith('attn.qkv.weight'))
    assert starts(place / 'other')[0]['seed'] == 4


@pytest.mark.parametrize('seed', ['-1', '4294967296'])
def test_seed_out_of_range(place, seed, capsys):
    with pytest.raises(SystemExit):
        train(place, 'never', '--seed', seed)
    assert f'--seed must be within 0 and 2^32 - 1, got {seed}' in capsys.readouterr().err
    assert not (place / 'never').exists()


def test_what_a_run_writes_down(place, run):
    (path,) = run.glob('*/run.json')
    record = json.loads(path.read_text())
    assert record['outcome'] == 'finished' and record['error'] is None
    assert record['started'] <= record['ended'] and record['ended'].endswith('Z')
    assert record['seed'] == 3 and record['deterministic'] is True and record['processes'] == 1
    assert record['command'].startswith(sys.orig_argv[0]) and Path(record['directory']).is_dir()
    config = record['config']
    assert Path(config['file']) == place / 'tiny.py' and config['dumped'] == 'vis_data/config.py'
    dumped = path.parent / config['dumped']
    assert sha256(dumped) == config['sha256']
    assert Config.fromfile(dumped).randomness == dict(seed=3, deterministic=True)
    assert record['versions']['mmengine'] and record['versions']['adala_mm'] and record['hardware']['threads'] == 1
    assert record['source'] == git_state()
    assert record['weights'] == [dict(file=str(place / 'start.pth'), role='init_cfg',
                                      sha256=sha256(place / 'start.pth'))]
    state = load_checkpoint(place / 'start.pth')
    assert record['loaded'] == {'backbone': dict(tensors=len(state), fingerprint=fingerprint(state))}


def test_without_options_the_config_s_seed_counts(place):
    record = starts(train(place, 'plain', '--cfg-options', 'train_cfg.max_iters=1'))[0]
    assert record['seed'] == 0 and record['deterministic'] is False


def test_interrupted_then_resumed(place):
    with pytest.raises(KeyboardInterrupt):
        train(place, 'stopped', '--cfg-options', *ending(after=4, error='KeyboardInterrupt'))
    (first,) = (place / 'stopped').glob('*/run.json')
    text = first.read_text()
    record = json.loads(text)
    assert record['outcome'] == 'interrupted' and record['error'].startswith('KeyboardInterrupt') and record['ended']
    checkpoint = place / 'stopped/iter_3.pth'
    resumed_from = sha256(checkpoint)
    train(place, 'stopped', '--resume')
    assert first.read_text() == text
    (resumed,) = [start for start in starts(place / 'stopped') if start != record]
    assert resumed['outcome'] == 'finished'
    assert {entry['role']: (Path(entry['file']).name, entry['sha256']) for entry in resumed['weights']} == dict(
        init_cfg=('start.pth', sha256(place / 'start.pth')), resume=('iter_3.pth', resumed_from))


def test_failed(place):
    with pytest.raises(ValueError, match='something is wrong'):
        train(place, 'failed', '--cfg-options', *ending(after=1, error='ValueError'))
    (record,) = starts(place / 'failed')
    assert (record['outcome'], record['error']) == ('failed', 'ValueError: something is wrong:')


def test_missing_weights_are_a_failure(place):
    with pytest.raises(SystemExit, match='error: no checkpoint at /absent.pth'):
        train(place, 'absent', '--cfg-options', 'model.backbone.init_cfg.checkpoint=/absent.pth')
    (record,) = starts(place / 'absent')
    assert record['outcome'] == 'failed' and '/absent.pth' in record['error'] and 'weights' not in record


def fake_runner(folder: Path, **facts) -> SimpleNamespace:
    return SimpleNamespace(log_dir=str(folder), cfg=Config(dict(model=dict())), seed=0, hooks=[], **facts)


def test_nothing_is_overwritten(tmp_path):
    for count in (1, 2, 3):
        hook = ProvenanceHook()
        hook.before_run(fake_runner(tmp_path))
        assert len(list(tmp_path.iterdir())) == count
    hook.after_run(fake_runner(tmp_path))
    assert [start['outcome'] for start in map(json.loads, (path.read_text() for path in sorted(tmp_path.iterdir())))
            ].count('running') == 2


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, 'is_main_process', lambda: False)
    hook = ProvenanceHook()
    runner = fake_runner(tmp_path)
    for moment in ('before_run', 'before_train', 'before_test', 'after_run'):
        getattr(hook, moment)(runner)
    hook.end('failed', 'of the second process')
    assert not list(tmp_path.iterdir())


def test_a_tested_checkpoint_is_written_down(tmp_path):
    torch.save(dict(a=torch.zeros(1)), tmp_path / 'epoch_1.pth')
    runner = fake_runner(tmp_path / 'log', _load_from=str(tmp_path / 'epoch_1.pth'), _resume=False,
                         model=torch.nn.Identity(), work_dir=str(tmp_path))
    runner.cfg.model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='not loaded for a test')))
    hook = ProvenanceHook()
    hook.before_run(runner)
    hook.before_test(runner)
    record = json.loads((tmp_path / 'log/run.json').read_text())
    assert record['weights'] == [dict(file=runner._load_from, role='load_from',
                                      sha256=sha256(tmp_path / 'epoch_1.pth'))]
    assert record['config'] == dict(file=None, dumped=None, sha256=None)


def test_checkpoints_of_a_config():
    model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='a.pth'), checkpoint=None),
                 heads=[dict(checkpoint='b.pth'), dict(with_cp=True)], teacher=dict(init_cfg=None))
    assert sorted(provenance.named_checkpoints(model)) == ['a.pth', 'b.pth']
    assert list(provenance.named_checkpoints(None)) == []


def test_files_behind_names(tmp_path, monkeypatch):
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints/net.pth').write_bytes(b'downloaded')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda repository, name: str(tmp_path / repository / name))
    folder = tmp_path / 'timm/vit_large_patch14_clip_224.openai'  # what timm calls ..._clip_quickgelu_224.openai
    folder.mkdir(parents=True)
    (folder / 'model.safetensors').write_bytes(b'of timm')
    found = [checkpoint_sha256(name) for name in (
        'https://example.org/some/net.pth?download=1', 'timm://vit_large_patch14_clip_quickgelu_224.openai',
        'timm://vit_large_patch14_dinov2.lvd142m', str(tmp_path / 'absent.pth'))]
    assert found == [hashlib.sha256(text).hexdigest() for text in (b'downloaded', b'of timm')] + [None, None]


def test_hash_of_a_large_file(tmp_path):
    path = tmp_path / 'large'
    path.write_bytes(bytes(range(256)) * (2 ** 17) + b'rest')  # two pieces and a bit
    assert file_sha256(path) == sha256(path)


def test_git_state(tmp_path, monkeypatch):
    if not shutil.which('git'):
        pytest.skip('no git')
    monkeypatch.setattr('adala_mm.utils.machine.__file__', str(tmp_path / 'package/machine.py'))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    (tmp_path / 'package').mkdir()
    assert git_state() == dict(commit=None, dirty=None)
    (tmp_path / 'package/machine.py').write_text('one')
    (tmp_path / 'code.py').write_text('of somebody else, whose repository holds the environment')

    def git(*words: str) -> str:
        who = ['-c', 'user.name=A', '-c', 'user.email=a@example.org', '-c', 'commit.gpgsign=false']
        return subprocess.run(['git', *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git('init', '-q')
    git('add', 'code.py')
    git('commit', '-q', '-m', 'theirs')
    assert git_state() == dict(commit=None, dirty=None)
    git('add', '.')
    git('commit', '-q', '-m', 'code')
    assert git_state() == dict(commit=git('rev-parse', 'HEAD').strip(), dirty=False)
    (tmp_path / 'package/machine.py').write_text('two')
    assert git_state()['dirty'] is True
    monkeypatch.setenv('PATH', str(tmp_path))
    assert git_state() == dict(commit=None, dirty=None)
