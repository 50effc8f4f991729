"""What runs leave behind is read correctly, and kept by maintenance/record_runs.py."""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from adala_mm.utils import records
from adala_mm.utils.atomic import write_atomically
from adala_mm.utils.machine import machine
from adala_mm.utils.records import curve, read_scalars
from helpers import ROOT
from helpers.records import MACHINE
from helpers.scripts import load_script


def write_log(run, *rows: dict, stamp='20260101_000000') -> None:
    path = run / stamp / 'vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def trained(step: int, loss: float, time=0.5) -> dict:
    return {'lr': 0.1, 'data_time': 0.01, 'loss': loss, 'time': time, 'iter': step, 'step': step}


def scored(step: int, **scores: float) -> dict:
    return {**scores, 'data_time': 0.01, 'time': 0.2, 'step': step}


@pytest.fixture
def run(tmp_path):
    """Work dir of a finished run: validation, three log lines, validation."""
    run = tmp_path / 'some_run'
    write_log(run, scored(0, mIoU=5.0), trained(10, 0.9, 0.5), trained(20, 0.5, 0.7), trained(30, 0.25, 0.9),
              scored(30, mIoU=60.0))
    (run / 'mask2former_x.py').write_text("model = dict(type='X')\nrandomness = dict(deterministic=True, seed=17)\n")
    torch.save(dict(meta=dict(iter=30)), run / 'iter_30.pth')
    (run / 'iter_20.pth').write_bytes(b'older weights')
    (run / 'last_checkpoint').write_text(f'/another/machine/{run.name}/iter_30.pth\n')
    return run


def test_scalars_come_in_order(run):
    rows = read_scalars(run)
    assert [row['step'] for row in rows] == [0, 10, 20, 30, 30]
    assert rows[1] == trained(10, 0.9) and read_scalars(str(run)) == rows


def test_the_newest_log_counts(run):
    write_log(run, trained(40, 0.1), stamp='20251231_235959')
    assert len(read_scalars(run)) == 5
    write_log(run, trained(40, 0.1), stamp='20260101_000001')
    assert read_scalars(run) == [trained(40, 0.1)]


def test_a_run_that_was_taken_up_again_is_one_run(run):
    """Rows that a resumed start logged again count once, as logged last; a start that is no resumption begins anew."""
    def start(stamp: str, config: str, *rows: dict) -> None:
        write_log(run, *rows, stamp=stamp)
        (run / stamp / 'vis_data/config.py').write_text(config)

    start('20260101_000001', 'x = 1\nresume = True\n', trained(30, 0.2), scored(30, mIoU=61.0), trained(40, 0.1))
    start('20260101_000002', 'resume = True\n', scored(40, mIoU=70.0))
    rows = read_scalars(run)
    assert [(row['step'], row.get('loss', row.get('mIoU'))) for row in rows] == [
        (0, 5.0), (10, 0.9), (20, 0.5), (30, 0.2), (30, 61.0), (40, 0.1), (40, 70.0)]
    start('20260101_000003', 'resume = False\n', trained(10, 0.8))
    assert read_scalars(run) == [trained(10, 0.8)]
    start('20260101_000004', 'resume = True\n', trained(20, 0.4))
    assert [row['step'] for row in read_scalars(run)] == [10, 20]


@pytest.mark.parametrize(('noted', 'resume', 'continued'), [
    (dict(weights=[dict(role='init_cfg')]), True, False),  # --resume, and nothing was there
    (dict(weights=[dict(role='init_cfg'), dict(role='resume')]), False, True),
    (dict(outcome='failed'), True, True), (dict(outcome='failed'), False, False),  # it ended before it could say
    (None, True, True)])
def test_a_continuation_is_what_was_resumed(noted, resume, continued, run):
    folder = run / '20260101_000001'
    write_log(run, trained(10, 0.8), stamp=folder.name)
    (folder / 'vis_data/config.py').write_text(f'resume = {resume}\n')
    if noted is not None:
        (folder / 'run.json').write_text(json.dumps(noted))
    assert curve(run, 'loss') == (([10, 20, 30], [0.8, 0.5, 0.25]) if continued else ([10], [0.8]))


def test_no_log_is_an_error_that_names_the_folder(tmp_path):
    (tmp_path / 'run/20260101_000000/vis_data').mkdir(parents=True)
    for run in (tmp_path / 'run', tmp_path / 'absent'):
        with pytest.raises(FileNotFoundError, match=re.escape(str(run))):
            read_scalars(run)


def test_curve(run):
    assert curve(run, 'loss') == ([10, 20, 30], [0.9, 0.5, 0.25])
    assert curve(run, 'mIoU') == ([0, 30], [5.0, 60.0])
    assert curve(run, 'never logged') == ([], [])


def test_logs_of_mmengine_are_read(tmp_path):
    # The real writer, not our idea of its format.
    from mmengine.visualization import LocalVisBackend
    backend = LocalVisBackend(str(tmp_path / 'run/20260101_000000/vis_data'))
    backend.add_scalars({'loss': 0.5, 'time': 0.1}, step=10)
    backend.add_scalars({'mIoU': 40.0}, step=10)
    assert curve(tmp_path / 'run', 'loss') == ([10], [0.5]) and curve(tmp_path / 'run', 'mIoU') == ([10], [40.0])


def test_machine():
    facts = machine()
    assert set(facts) == set(MACHINE)
    assert facts['torch'] == torch.__version__ and facts['cores'] == os.cpu_count()
    assert facts['python'].split('.')[:2] == [str(part) for part in sys.version_info[:2]]
    json.dumps(facts)


def test_machine_knows_the_commit_of_the_code(tmp_path, monkeypatch):
    if not (shutil.which('git') and (ROOT / '.git').exists()):
        pytest.skip('no git, or not a checkout')
    git = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=True)
    monkeypatch.chdir(tmp_path)  # the code's commit, not that of the folder one happens to stand in
    assert machine()['commit'] == git.stdout.strip()


def test_machine_outside_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr('adala_mm.utils.machine.__file__', str(tmp_path / 'machine.py'))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert machine()['commit'] == 'unknown'


def test_machine_without_git(tmp_path, monkeypatch):
    # A report at the end of a run must not fail because a container has no git.
    monkeypatch.setenv('PATH', str(tmp_path))
    assert machine()['commit'] == 'unknown'


def test_record(run):
    record = load_script('maintenance/record_runs').record(run)
    assert record == {
        'config': 'mask2former_x', 'seed': 17, 'iterations': 30, 'checkpoint': 'iter_30.pth',
        'scores': [{'mIoU': 5.0, 'step': 0}, {'mIoU': 60.0, 'step': 30}],
        'sha256': hashlib.sha256((run / 'iter_30.pth').read_bytes()).hexdigest()[:16]}


@pytest.mark.parametrize(('name', 'iterations'), [('iter_35.pth', 35), ('epoch_2.pth', 34)])
def test_iterations_are_those_of_the_checkpoint(name, iterations, run):
    """The log ends at a multiple of its interval, and counts validations in epochs if the run has them."""
    torch.save(dict(meta=dict(iter=iterations, epoch=2)), run / name)
    (run / 'last_checkpoint').write_text(str(run / name))
    assert load_script('maintenance/record_runs').record(run)['iterations'] == iterations


def test_record_of_a_dumped_config(run):
    from mmengine.config import Config
    (run / 'mask2former_x.py').unlink()
    Config.fromfile(ROOT / 'configs/real/stage1_deitt_caltech.py').dump(str(run / 'stage1_deitt_caltech.py'))
    record = load_script('maintenance/record_runs').record(run)
    assert (record['config'], record['seed']) == ('stage1_deitt_caltech', 0)


def test_recorder_keeps_what_it_knows(run, tmp_path, monkeypatch):
    recorder, out = load_script('maintenance/record_runs'), tmp_path / 'real.json'
    monkeypatch.setattr(recorder, 'machine', lambda: MACHINE)
    out.write_text(json.dumps({'earlier_run': {'seed': 3}, 'some_run': {'seed': 4}}))
    monkeypatch.setattr(sys, 'argv', ['record_runs.py', str(run), '--out', str(out)])
    recorder.main()
    known = json.loads(out.read_text())
    assert known == {'earlier_run': {'seed': 3}, 'some_run': recorder.record(run) | {'machine': MACHINE}}
    first = out.read_text()
    recorder.main()
    assert out.read_text() == first


@pytest.mark.parametrize('writer', ['record_runs', 'save'])
def test_a_kill_while_records_are_written_leaves_those_before(writer, run, tmp_path, monkeypatch):
    out = tmp_path / 'results/real.json'
    records.save(out, {'earlier_run': {'seed': 3}})
    before = out.read_bytes()

    def killed(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr('os.fsync', killed)
    monkeypatch.setattr(sys, 'argv', ['record_runs.py', str(run), '--out', str(out)])
    with pytest.raises(KeyboardInterrupt):
        load_script('maintenance/record_runs').main() if writer == 'record_runs' else records.save(out, {})
    assert out.read_bytes() == before


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / 'pipe'
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # so that writing does not wait
    try:
        write_atomically(pipe, b'content')
        assert os.read(reader, 100) == b'content' and pipe.is_fifo()
    finally:
        os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ['pipe']
