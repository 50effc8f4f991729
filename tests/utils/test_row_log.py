"""Rows of a benchmark: those of other conditions stay apart, and torn lines are left out."""
from __future__ import annotations

import pytest

from adala_mm.utils.row_log import RowLog, latest_rows, read_runs

MACHINE = dict(device='A GPU', commit='abc', torch='2.11', driver='1', cuda='13.0', triton='3.6')


def test_rows_of_other_conditions(tmp_path, monkeypatch):
    """Known are rows of the same sources, machine and versions; of rows with a key the last one counts for readers."""
    path = tmp_path / 'a.jsonl'

    def log(**facts) -> RowLog:
        return RowLog(path, ['n'], MACHINE | facts, dict(seconds=1))
    first = log()
    first.add(dict(n=1, ms=2.0))
    first.add(dict(n=2, ms=3.0))
    assert log(commit='def').has(n=1) and not log(commit='def').has(n=3) and not log(driver='2').has(n=1)
    monkeypatch.setattr('adala_mm.utils.row_log.sources_fingerprint', lambda: 'others')
    changed = log(commit='def')
    assert not changed.has(n=1)
    changed.add(dict(n=1, note='out of memory'))
    assert latest_rows(path) == ([dict(n=1, note='out of memory'), dict(n=2, ms=3.0)],
                                 [MACHINE | dict(commit='def'), MACHINE])
    with pytest.raises(ValueError, match='a.jsonl holds rows of A GPU, this is a CPU: name another folder with --out'):
        log(device='a CPU')


def test_torn_lines(tmp_path, capsys):
    path = tmp_path / 'a.jsonl'
    RowLog(path, ['n'], MACHINE, {}).add(dict(n=1))
    with open(path, 'a') as file:
        file.write('{"n": 2, "m')
    log = RowLog(path, ['n'], MACHINE, {})
    assert not log.has(n=2)
    log.add(dict(n=3))
    assert [rows for _, rows in read_runs(path)] == [[dict(n=1)], [dict(n=3)]]
    assert f'{path}, line 3 is torn and left out: {{"n": 2, "m' in capsys.readouterr().err
    path.write_text('{"n": 1}\n')
    with pytest.raises(ValueError, match='does not begin with a line that says what its rows are measured on'):
        latest_rows(path)
