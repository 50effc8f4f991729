"""`make test-faults`: whatever happens to a run, nothing is lost. Real processes, real signals, a real full disk.

Each test says which fault it is, what is expected, and what was seen; the table of them closes the run. The pieces
that need no real process are in engine/test_resume.py, engine/test_non_finite.py and test_distributed.py.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.machine import machine
from adala_mm.utils.records import save
from adala_mm.utils.tables import markdown_table
from helpers import ROOT
from helpers.resuming import (
    CELLS,
    FEATURES,
    STEPS,
    accumulated,
    assert_same_end,
    assert_same_run,
    config,
    diary,
    last,
    strike_and_resume,
    with_features,
)
from helpers.resuming import train as run

EPOCHS = last(by_epoch=True)


@pytest.fixture
def table(record_property) -> Callable[..., None]:
    """Takes the three cells of a row; the last one only when everything has been asserted."""
    def row(fault: str, expected: str, seen: str) -> None:
        for key, value in (('fault', fault), ('expected', expected), ('seen', seen)):
            record_property(key, value)
    return row


def environment(**more: str) -> dict[str, str]:
    outside = {key: value for key, value in os.environ.items() if key not in (
        'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'NNODES', 'NODE_RANK')}
    return outside | dict(PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', OMP_NUM_THREADS='1',
                          PYTHONPATH=f'{ROOT}:{ROOT / "tests"}', OMP_WAIT_POLICY='PASSIVE') | more


def dump(cfg: Config, place: Path, harm: dict | None = None) -> str:
    """The config as a file of its own; ``harm`` are the saboteur's options."""
    cfg = cfg.copy()
    cfg.custom_imports = dict(imports=['helpers.saboteur'])
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='Diary')]
    if harm:
        cfg.custom_hooks.append(dict(type='Saboteur', **harm))
    path = place / f'{len(list(place.glob("*.py")))}.py'
    cfg.dump(str(path))
    return str(path)


def train(cfg: Config, work_dir: Path, harm: dict | None = None, gpus: int = 1, timeout: float = 120,
          terminate: bool = False) -> tuple[int, str]:
    """`tools/train.py`, or `dist_train.sh` on several processes; its exit code and what it printed.

    ``terminate``: SIGTERM to the command, not to its children, once the saboteur waits for it.
    """
    work_dir.parent.mkdir(parents=True, exist_ok=True)
    words = [dump(cfg, work_dir.parent, harm), '--work-dir', str(work_dir), '--resume']
    if gpus > 1:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            env = environment(PORT=str(free.getsockname()[1]))
        words = ['bash', str(ROOT / 'tools/dist_train.sh'), words[0], str(gpus), *words[1:]]
    else:
        env, words = environment(), [sys.executable, str(ROOT / 'tools/train.py'), *words]
    with open(work_dir.parent / 'printed.txt', 'w+') as file:
        process = subprocess.Popen(words, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while terminate and process.poll() is None and not (work_dir / 'waiting').exists():
                time.sleep(0.1)
            if terminate:
                process.terminate()
            code = process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        file.seek(0)
        return code, file.read()


def finish(cfg: Config, work_dir: Path, **options) -> str:
    code, printed = train(cfg, work_dir, **options)
    assert code == 0, printed[-4000:]
    return printed


@pytest.fixture(scope='session')
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('faults')


@pytest.fixture(scope='session')
def whole(place) -> Callable[..., Path]:
    """Uninterrupted runs by name, each made once in a process of its own."""
    def run(name: str, cfg: Config, gpus: int = 1) -> Path:
        work_dir = place / f'whole_{name}' / 'run'
        if not (work_dir / 'diary.jsonl').exists():
            finish(cfg, work_dir, gpus=gpus)
        return work_dir
    return run


def often(cfg: Config) -> Config:
    """Saves every three iterations, inside epochs too."""
    cfg = cfg.copy()
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=3, save_last=True, max_keep_ckpts=2)
    return cfg


# Where ten processes of one run die, one after the other. Checkpoints are written after 3, 6, 9, 12 and 15 iterations.
POINTS = [('batch', 0), ('half', 3), ('written', 3), ('optimizer', 4), ('renamed', 6), ('step', 7), ('half', 9),
          ('validation', 10), ('batch', 11), ('optimizer', 14)]


@pytest.mark.parametrize(('name', 'by_epoch', 'workers'), [('stage2', True, 1), ('mask2former', False, 0)])
def test_ten_sigkills(scenes, sharp_pretrained, tmp_path, whole, table, name, by_epoch, workers):
    cfg = often(config(name, scenes, sharp_pretrained, by_epoch, workers))
    wanted = whole(name, cfg)
    work_dir, killed, progress = tmp_path / name / 'run', 0, []
    for when, at in POINTS:
        code, printed = train(cfg, work_dir, harm=dict(what='kill', when=when, at=at))
        assert code == -signal.SIGKILL, (when, at, printed[-4000:])
        killed += 1
        progress.append(max([0, *(int(path.stem[5:]) for path in work_dir.glob('iter_*.pth'))]))
    finish(cfg, work_dir)
    assert progress == sorted(progress) and progress[-1] == 12
    # A process that dies right after a checkpoint has been renamed has done the step, and not written it down.
    assert_same_run(wanted, work_dir, 'iter_15.pth', unwritten=[5])
    table(f'{name}: SIGKILL x {len(POINTS)}', 'resumed run bitwise equal',
          f'{killed} killed at {", ".join(f"{when} {at}" for when, at in POINTS)}; all weights, losses, batches and '
          'optimizer states equal')


def test_torn_checkpoint(scenes, sharp_pretrained, tmp_path, whole, table):
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True)
    wanted, work_dir = whole('epochs on 1', cfg), tmp_path / 'run'
    train(cfg, work_dir, harm=dict(what='kill', when='step', at=11))
    newest = work_dir / 'epoch_2.pth'
    newest.write_bytes(newest.read_bytes()[:newest.stat().st_size // 2])
    printed = finish(cfg, work_dir)
    said = re.search(r'(\S*epoch_2.pth) is damaged .*: taking another one', printed)
    assert said and 'epoch_1.pth' in printed
    assert_same_run(wanted, work_dir, EPOCHS)
    table('newest checkpoint torn', 'the one before it is used, with a message', 'said so; resumed run bitwise equal')


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    path.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(path)], check=False,
                      capture_output=True).returncode:
        pytest.skip('a tmpfs can only be mounted as root')
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', str(path)], check=True)


def test_full_disk(scenes, sharp_pretrained, tmp_path, whole, table):
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True)
    cfg.default_hooks.checkpoint.max_keep_ckpts = -1
    wanted = whole('epochs on 1', cfg)
    size = (wanted / 'epoch_2.pth').stat().st_size
    with small_disk(tmp_path / 'disk', int(2.5 * size)):
        work_dir = tmp_path / 'disk/run'
        code, printed = train(cfg, work_dir)
        assert code == 1 and re.search(r'OSError: .*no space for \S*epoch_[23].pth: it needs .* MiB', printed)
        kept = sorted(work_dir.glob('*.pth'))
        assert kept and all('state_dict' in load_checkpoint(path) for path in kept)
        assert not list(work_dir.glob('*.part'))
        subprocess.run(['mount', '-o', f'remount,size={20 * size}', str(tmp_path / 'disk')], check=True)
        finish(cfg, work_dir)
        assert_same_run(wanted, work_dir, EPOCHS)
    table('disk full', 'clear error, last good checkpoint intact',
          f'error named file and space; {len(kept)} whole checkpoint(s) left; with room made, bitwise equal')


@pytest.mark.parametrize('gpus', [1, 2])
def test_sigterm(scenes, sharp_pretrained, tmp_path, whole, table, gpus):
    """To the command itself, as a cluster sends it; torchrun hands it on."""
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True)
    cfg.train_dataloader.batch_size //= gpus
    cfg.default_hooks.preemption.interval = 1
    wanted, work_dir = whole(f'epochs on {gpus}', cfg, gpus), tmp_path / 'run'
    code, printed = train(cfg, work_dir, harm=dict(what='wait', when='step', at=6), gpus=gpus, terminate=True)
    assert code == (143 if gpus == 1 else 1), printed[-4000:]
    assert 'saving preempted.pth after iteration' in printed and (work_dir / 'preempted.pth').is_file()
    finish(cfg, work_dir, gpus=gpus)
    assert_same_run(wanted, work_dir, EPOCHS)
    assert len((work_dir / 'diary.jsonl').read_text().splitlines()) == STEPS
    table(f'SIGTERM, {gpus} process(es)', 'saves and exits; no step is lost or done twice',
          f'exit code {code}; bitwise equal, {STEPS} steps in all')


def test_worker_killed(scenes, sharp_pretrained, tmp_path, whole, table):
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True, workers=2)
    wanted, work_dir = whole('workers', cfg), tmp_path / 'run'
    begin = time.monotonic()
    code, printed = train(cfg, work_dir, harm=dict(what='worker', when='batch', at=7))
    assert code == 1 and re.search(r'DataLoader worker .*(killed by signal|exited unexpectedly)', printed)
    assert (work_dir / 'epoch_1.pth').is_file()
    waited = time.monotonic() - begin
    finish(cfg, work_dir)
    assert_same_run(wanted, work_dir, EPOCHS)
    table('data worker killed', 'error within a minute, resumable', f'ended after {waited:.0f} s in all; bitwise equal')


def test_rank_killed(scenes, sharp_pretrained, tmp_path, whole, table):
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True)
    cfg.train_dataloader.batch_size //= 2
    cfg.default_hooks.preemption.interval = 1  # as in the test before, for the sake of one uninterrupted run
    wanted, work_dir = whole('epochs on 2', cfg, 2), tmp_path / 'run'
    begin = time.monotonic()
    code, printed = train(cfg, work_dir, harm=dict(what='kill', when='batch', at=7, rank=1), gpus=2)
    waited = time.monotonic() - begin
    assert code == 1 and 'SIGKILL' in printed and waited < 60
    assert max(diary(work_dir)) <= 7  # process 0 did not go on alone
    finish(cfg, work_dir, gpus=2)
    assert_same_run(wanted, work_dir, EPOCHS)
    table('one of two processes killed', 'all stop within a minute', f'all stopped, {waited:.0f} s after the start of '
          'the run; resumed bitwise equal')


@pytest.mark.parametrize('what', ['nan', 'inf'])
def test_not_finite(scenes, sharp_pretrained, tmp_path, table, what):
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True)
    work_dir = tmp_path / 'run'
    code, printed = train(cfg, work_dir, harm=dict(what=what, when='batch' if what == 'nan' else 'optimizer', at=7))
    assert code == 1, printed[-4000:]
    *_, error = [line for line in printed.splitlines() if re.match(r'\w+(\.\w+)*Error: ', line)]
    assert 'iteration 8: loss or gradients are not finite' in error and 'epoch_1.pth' in error, error
    record = (work_dir / 'non_finite_iter_8.json').read_text()
    assert '.png' in record and str(work_dir / 'non_finite_iter_8.json') in error
    assert what == 'inf' or ('process 0: first the images themselves' in error and '.png' in error), error
    weights = load_checkpoint(work_dir / 'epoch_1.pth')['state_dict']
    assert all(bool(value.isfinite().all()) for value in weights.values())
    table('NaN in an image' if what == 'nan' else 'infinite gradient', 'names step, place, rank and images; good '
          'checkpoint intact', error.replace(f'{tmp_path}/', '')[:110] + ' ...')


def test_wrong_labels(scenes, sharp_pretrained, tmp_path, table):
    shutil.copytree(scenes, tmp_path / 'scenes')
    bad = tmp_path / 'scenes/labels/train/0003.png'
    label = cv2.imread(str(bad), cv2.IMREAD_UNCHANGED)
    label[:9] = 17
    cv2.imwrite(str(bad), label)
    code, printed = train(config('mask2former', tmp_path / 'scenes', sharp_pretrained, False), tmp_path / 'run')
    *_, error = [line for line in printed.splitlines() if re.match(r'\w+(\.\w+)*Error: ', line)]
    assert code == 1 and '17' in error and '0003.png' in error, error
    table('labels beyond the classes', 'names image, value and fix', error.replace(f'{tmp_path}/', '')[:110] + ' ...')


def test_truncated_images(scenes, sharp_pretrained, tmp_path, table):
    shutil.copytree(scenes, tmp_path / 'scenes')
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / 'scenes/images/train').iterdir())[:2]:
        jpeg = cv2.imencode('.jpg', rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))[1].tobytes()
        path.write_bytes(jpeg[:len(jpeg) // 2] if path.stem == '0000' else b'')
    cfg = config('stage2', tmp_path / 'scenes', sharp_pretrained, by_epoch=True)
    cfg.train_dataloader.dataset.update(type='adala_mm.ImageFiles')
    cfg.train_dataloader.dataset.pop('with_label')
    finish(cfg, tmp_path / 'run')
    listed = (tmp_path / 'run/corrupt_images.txt').read_text().splitlines()
    assert sorted(Path(line.split('\t')[0]).name for line in listed) == ['0000.png', '0001.png']
    cfg.default_hooks.corrupt.max_corrupt = 0
    code, printed = train(cfg, tmp_path / 'strict/run')
    *_, error = [line for line in printed.splitlines() if re.match(r'\w+(\.\w+)*Error: ', line)]
    assert code == 1 and 'max_corrupt=0' in error and '.png' in error, error
    table('truncated and empty images', 'skipped, counted and listed; too many stop the run',
          f'{len(listed)} listed, the run went on; with max_corrupt=0: {error[:90]} ...')


def assert_close(one: Path, two: Path) -> None:
    states = [load_checkpoint(path)['state_dict'] for path in (one, two)]
    assert all(torch.allclose(value, states[1][key], rtol=1e-3, atol=1e-5) for key, value in states[0].items())


def test_resumed_on_two_processes(scenes, sharp_pretrained, tmp_path, whole, table):
    """In the middle of an epoch and of an accumulation; the two have the batch of the one."""
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True)
    cfg.model.backbone.drop_path_rate = 0.0  # drawn by each process
    accumulated(cfg)
    wanted, work_dir = whole('accumulated', cfg), tmp_path / 'run'
    code, printed = train(cfg, work_dir, harm=dict(what='terminate', when='step', at=6))
    assert code == 143, printed[-4000:]
    done = len(diary(work_dir))
    cfg.train_dataloader.batch_size //= 2
    printed = finish(cfg, work_dir, gpus=2)
    assert (f'2 process(es) x 1 x 3 accumulated go on where 1 process(es) x 2 x 3 accumulated were: after '
            f'{2 * done - 10} samples of epoch 2.') in printed
    assert f'No gradient is lost: those of {done % 3} iterations are in the checkpoint' in printed
    other = {step: rest for step, *rest in map(json.loads, (work_dir / 'diary1.jsonl').read_text().splitlines())}
    for step, (batch, images, *_) in diary(wanted).items():
        mine = diary(work_dir)[step]
        assert (mine[0], sorted(mine[1] + (other[step][1] if step >= done else []))) == (batch, sorted(images))
    assert_close(wanted / EPOCHS, work_dir / EPOCHS)
    table('resumed on two processes, inside an epoch and an accumulation',
          'every image once, weights equal up to rounding',
          f'{done} steps on one, {STEPS - done} on two: the same images in each; weights equal up to rounding')


def test_sums_of_two_processes(scenes, sharp_pretrained, tmp_path, whole, table):
    """Each has a sum of gradients of its own when the epoch ends, and only one writes."""
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True)
    cfg.train_dataloader.batch_size //= 2
    cfg.default_hooks.preemption.interval = 1
    accumulated(cfg)
    wanted, work_dir = whole('accumulated on 2', cfg, 2), tmp_path / 'run'
    train(cfg, work_dir, harm=dict(what='kill', when='batch', at=7), gpus=2)
    printed = finish(cfg, work_dir, gpus=2)
    assert 'No gradient is lost: those of 2 iterations are in the checkpoint' in printed
    assert_same_run(wanted, work_dir, EPOCHS)
    table('one of two processes killed, gradients summed up over the end of an epoch', 'resumed run bitwise equal',
          'bitwise equal')


@pytest.mark.parametrize('pair', itertools.combinations(FEATURES, 2), ids='-'.join)
def test_pair(scenes, corrupt_scenes, sharp_pretrained, tmp_path, table, pair):
    cfg = with_features(pair, scenes, sharp_pretrained)
    run(cfg, tmp_path / 'whole')
    for cell, harm in CELLS.items():
        strike_and_resume(cfg, tmp_path / '-'.join(cell), harm)
        assert_same_end(tmp_path / 'whole', tmp_path / '-'.join(cell))
    table(' x '.join(pair), 'resumed run bitwise equal', f'equal after {", ".join(map(" in ".join, CELLS))}')


class Table:
    """Prints the rows that tests recorded, in whichever process they ran, and writes them where ``out`` says."""

    def __init__(self, out: Path | None) -> None:
        self.rows: list[tuple] = []
        self.out = out

    def pytest_runtest_logreport(self, report) -> None:
        cells = dict(report.user_properties)
        if report.when == 'call' or report.outcome != 'passed':
            name = report.nodeid.rpartition('::')[2]
            seen = cells.get('seen') if report.passed else f'{report.outcome.upper()}: {report.longreprtext[-150:]}'
            row = (cells.get('fault', name), cells.get('expected', ''), seen)
            self.rows.append(tuple(' '.join(str(cell).split()) for cell in row))

    def pytest_terminal_summary(self, terminalreporter) -> None:
        header = ['fault', 'expected', 'seen']
        terminalreporter.write_line('\n' + markdown_table(header, sorted(self.rows)))
        if self.out is not None:
            save(self.out, dict(rows=sorted(self.rows), machine=machine()))


if __name__ == '__main__':
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, help='where the rows are recorded')
    args, others = parser.parse_known_args()
    sys.exit(pytest.main([__file__, '-q', '-p', 'no:cacheprovider', *(others or ['-n', '2'])],
                         plugins=[Table(args.out)]))
