"""The comparison of attentions: every registered one by default, resumable, and a table that says what was measured."""
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, put_back

from adala_mm.datasets import beacons
from adala_mm.utils.tables import attention_table

sys.path.insert(0, str(ROOT / 'tools'))
import compare_attentions


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The command on one attention and few, small things, with a thread in place of its processes."""
    put_back(monkeypatch)
    for split in beacons.SPLITS:
        monkeypatch.setitem(beacons.SPLITS, split, 20)
    monkeypatch.setattr(compare_attentions, 'ProcessPoolExecutor', lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(torch, 'set_num_threads', lambda count: None)  # this process has other tests to run
    monkeypatch.setattr(sys, 'argv', [
        'compare_attentions.py', '--iterations', '2', '2', '2', '--jobs', '1', '--work-dir', str(tmp_path / 'out'),
        '--data-root', str(tmp_path / 'data'), '--attentions', 'adala_mm.ViTALiTyAttention'])


def test_one_attention_and_once_more(small, tmp_path, monkeypatch, capsys):
    compare_attentions.main()
    said = capsys.readouterr().out
    assert 'teacher:' in said and '0 rows are there already, 1 to go' in said and 'ETA' in said

    data = json.loads((tmp_path / 'out/results.json').read_text())
    row, = data['rows']
    assert row['name'] == 'ViTALiTyAttention' and row['seed'] == 0
    assert len(row['miou']) == len(row['rel_error']) == 3 and all(0 <= value <= 100 for value in row['miou'])
    assert all(error > 0 for error in row['rel_error'])
    assert set(data['costs']) == {'SoftmaxAttention', 'ViTALiTyAttention'}
    assert all(cost['ms'] > 0 and cost['mib'] > 0 for cost in data['costs'].values())
    assert data['costs']['SoftmaxAttention']['gmac'] > 5 * data['costs']['ViTALiTyAttention']['gmac']
    assert data['iterations'] == dict(teacher=2, stage1=2, stage2=2)
    assert (tmp_path / 'out/comparison.md').read_text() == attention_table(data) + '\n'
    assert (tmp_path / 'out/comparison.png').read_bytes().startswith(b'\x89PNG')

    monkeypatch.setattr(compare_attentions, 'measure_costs', lambda names: {n: data['costs'][n] for n in names})
    with monkeypatch.context() as patch:  # files may be greater than the memory
        patch.delattr(Path, 'read_bytes')
        compare_attentions.main()
    assert '1 rows are there already, 0 to go' in capsys.readouterr().out
    assert json.loads((tmp_path / 'out/results.json').read_text())['rows'] == data['rows']


def test_rows_can_be_handed_to_other_processes():
    assert pickle.loads(pickle.dumps(compare_attentions.run_row)) is compare_attentions.run_row


def test_unknown_attention_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['compare_attentions.py', '--attentions', 'LinearAtention'])
    with pytest.raises(SystemExit) as error:
        compare_attentions.main()
    said = capsys.readouterr().err
    assert error.value.code == 2
    assert 'LinearAtention: no registered attention' in said and 'RALAAttention' in said


@pytest.fixture
def data() -> dict:
    cost = dict(ms=4.0, mib=8.0, gmac=1.0, parameters=0)
    costs = dict(SoftmaxAttention=cost, AAttention=cost | dict(ms=2.0), BAttention=cost | dict(parameters=1234))
    rows = [dict(name=f'{name}Attention', seed=seed, miou=[10.0, 20.0, last], rel_error=[1.0, 0.5, 0.25])
            for name, seed, last in (('A', 0, 50.0), ('A', 1, 60.0), ('B', 0, 70.0))]
    return dict(teacher=80.0, costs=costs, rows=rows)


def test_table_averages_seeds_and_puts_the_best_first(data):
    lines = attention_table(data).splitlines()
    assert [line.split(' | ')[0] for line in lines[2:]] == ['| softmax (teacher)', '| B', '| A']
    assert lines[3] == '| B | 10.00 | 20.00 | 70.00 | 1.00 / 0.50 / 0.25 | 1.00 | 1.00 | 1.00 | 1,234 |'
    assert '| 55.00 |' in lines[4] and '| 0.50 | 1.00 |' in lines[4]
