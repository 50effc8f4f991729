"""tools/analysis_tools/analyze_seeds.py: statistics of equal runs, and refusal of unequal ones."""
from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT

CONFIG = """
model = dict(type='Net', backbone=dict(depth={depth}, init_cfg=dict(checkpoint='{start}')), heads=[])
randomness = dict(seed={seed})
work_dir = '{folder}'
resume = {resume}
load_from = {load_from!r}
launcher = 'none'
"""


@pytest.fixture(scope='module')
def tool():
    path = ROOT / 'tools/analysis_tools/analyze_seeds.py'
    spec = importlib.util.spec_from_file_location('tool_analyze_seeds', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    def write(name: str, seed: int | None, stamp='20260101_000000', step=20, run=None, depth=2, start='a.pth',
              resume=False, load_from=None, **scores: float) -> Path:
        """A work dir with one log: two training steps, a validation far off, and one with ``scores``."""
        logs = tmp_path / name / stamp / 'vis_data'
        logs.mkdir(parents=True)
        rows = [dict(loss=1.0, lr=0.1, time=0.1, step=10), dict(mIoU=1.0, time=0.1, step=10),
                dict(loss=0.5, lr=0.1, time=0.1, step=step), *([scores | dict(time=0.1, step=step)] if scores else [])]
        (logs / 'scalars.json').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        (logs / 'config.py').write_text(CONFIG.format(folder=tmp_path / name, seed=seed, depth=depth, start=start,
                                                      resume=resume, load_from=load_from))
        if run:
            (logs.parent / 'run.json').write_text(json.dumps(dict(seed=seed, processes=1) | run))
        return tmp_path / name
    return write


@pytest.fixture
def analyze(tool, monkeypatch, capsys):
    def call(*words: str | Path) -> str:
        monkeypatch.setattr(sys, 'argv', ['analyze_seeds.py', *map(str, words)])
        tool.main()
        return capsys.readouterr().out
    return call


def cells(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in out.splitlines() if line.startswith('|')]


def test_statistics(run, analyze, tmp_path):
    values = {10: 50.5, 2: 49.0, 0: 52.0}
    runs = [run(f'run{seed}', seed, mIoU=value, aAcc=90.0) for seed, value in values.items()]
    out = analyze(*runs, '--json', tmp_path / 'out/seeds.json')
    header, rule, miou, aacc = cells(out)
    assert header[:6] == ['metric', 'n', 'mean', 'standard deviation', 'min', 'max'] and set(rule) == {'---'}
    assert miou == ['mIoU', '3', '50.5', '1.5', '49', '52', '0: 52, 2: 49, 10: 50.5']  # in the order of seeds
    assert aacc[:6] == ['aAcc', '3', '90', '0', '90', '90']
    assert 'step 20' in out and 'Without' not in out and 'More than one' not in out
    data = json.loads((tmp_path / 'out/seeds.json').read_text())
    assert data['step'] == 20 and [entry['seed'] for entry in data['runs']] == [0, 2, 10]
    found = data['metrics']['mIoU']
    assert found['std'] == pytest.approx(statistics.stdev(values.values())) and found['seeds'] == [0, 2, 10]
    assert found['mean'] == pytest.approx(50.5) and found['values'] == [52.0, 49.0, 50.5] and found['missing'] == []


def test_one_run_has_no_spread(run, analyze):
    assert cells(analyze(run('a', 0, mIoU=50.0)))[2] == ['mIoU', '1', '50', '-', '50', '50', '0: 50']


def test_chosen_metric_and_runs_without_it(run, analyze):
    runs = [run('a', 0, mIoU=50.0, aAcc=1.0, mAcc=7.0), run('b', 1, aAcc=3.0, mAcc=7.0)]
    out = analyze(*runs, '--metric', 'mIoU', 'aAcc')
    # The other run's mIoU of step 10 is not taken for its last one.
    assert [row[:3] for row in cells(out)[2:]] == [['mIoU', '1', '50'], ['aAcc', '2', '2']]
    assert f'Without mIoU: {runs[1]}' in out


def test_unknown_metric_names_those_that_there_are(run, analyze):
    with pytest.raises(SystemExit, match=r'no run has a score mDice; there are: mIoU, aAcc'):
        analyze(run('a', 0, mIoU=50.0, aAcc=1.0), '--metric', 'mDice')


def test_other_configs_are_refused(run, analyze):
    runs = [run('a', 0, mIoU=50.0), run('b', 1, mIoU=51.0, depth=3, start='b.pth')]
    with pytest.raises(SystemExit) as info:
        analyze(*runs)
    message = str(info.value)
    assert f'model.backbone.depth: 2 ({runs[0]}), 3 ({runs[1]})' in message
    assert "model.backbone.init_cfg.checkpoint: 'a.pth'" in message
    assert 'seed:' not in message and 'work_dir' not in message and '--ignore' in message


def test_leaves(tool):
    assert dict(tool.flat(dict(a=[], b={}, c=(), d=[1, dict(e=None)]))) == {
        'a': [], 'b': {}, 'c': (), 'd.0': 1, 'd.1.e': None}


def test_ignored_differences(run, analyze):
    runs = [run('a', 0, mIoU=50.0), run('b', 1, mIoU=52.0, start='b.pth')]
    assert cells(analyze(*runs, '--ignore', 'model.backbone.init_cfg'))[2][2] == '51'
    with pytest.raises(SystemExit):
        analyze(*runs, '--ignore', 'model.backbone.init')  # no key of that name


def test_numbers_of_processes_are_compared(run, analyze):
    runs = [run('a', 0, mIoU=50.0, run=dict(processes=8)), run('b', 1, mIoU=52.0, run=dict(processes=1))]
    with pytest.raises(SystemExit, match=r'processes: 8 .*, 1 '):
        analyze(*runs)
    runs = [runs[0], run('older', 2, mIoU=52.0)]  # did not write it down
    assert cells(analyze(*runs))[2][1] == '2'


def test_resumed_runs_are_runs(run, analyze):
    run('a', 0, mIoU=10.0)
    runs = [run('a', 0, stamp='20260102_000000', mIoU=50.0, resume=True, load_from='a/iter_10.pth'),
            run('b', 1, mIoU=52.0)]
    assert cells(analyze(*runs))[2][2] == '51'


def test_unfinished_runs_are_refused(run, analyze):
    with pytest.raises(SystemExit, match=r'different numbers of steps.*20 .*15 '):
        analyze(run('a', 0, mIoU=50.0), run('b', 1, mIoU=50.0, step=15))


def test_seed_drawn_by_the_run_itself(run, analyze):
    runs = [run(name, None, mIoU=50.0, run=dict(seed=seed)) for name, seed in (('a', 77), ('b', 5))]
    assert cells(analyze(*runs))[2][-1] == '5: 50, 77: 50'


def test_equal_seeds_and_other_code_are_pointed_out(run, analyze):
    runs = [run('a', 3, mIoU=50.0, run=dict(source=dict(commit='a' * 40))),
            run('b', 3, mIoU=52.0, run=dict(source=dict(commit='b' * 40)))]
    out = analyze(*runs)
    assert 'More than one run has seed 3' in out and 'commits aaaaaaaa, bbbbbbbb' in out


def test_bad_folders(run, analyze, tmp_path):
    good = run('a', 0, mIoU=50.0)
    with pytest.raises(SystemExit, match='named more than once'):
        analyze(good, good.parent / '.' / 'a')
    with pytest.raises(SystemExit, match=r'no training log .* in .*absent'):
        analyze(good, tmp_path / 'absent')
    for path in good.glob('*/vis_data/config.py'):
        path.unlink()
    with pytest.raises(SystemExit, match='no config at'):
        analyze(good)
    with pytest.raises(SystemExit, match='nothing to average'):
        never = run('never', 0)
        for log in never.glob('*/vis_data/scalars.json'):
            log.write_text('{"loss": 1.0, "step": 1}\n')
        analyze(never)


def test_picture(run, analyze, tmp_path):
    runs = [run(f'run{seed}', seed, mIoU=50.0 + seed, aAcc=90.0) for seed in range(3)]
    analyze(*runs, '--png', tmp_path / 'new/seeds.png')
    pixels = np.asarray(Image.open(tmp_path / 'new/seeds.png').convert('RGB'))
    assert pixels.shape[1] > pixels.shape[0] > 100 and pixels.std() > 5  # two panels, not blank
