"""Reads the logs of training runs, and writes records as JSON."""
from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

from adala_mm.utils.atomic import write_atomically

LOGGED_BESIDE_SCORES = {'step', 'iter', 'time', 'data_time', 'epoch'}


def newest_log(run: str | Path) -> Path:
    """The log of a run's last start, ``<work dir>/<time of start>/vis_data/scalars.json``. Its config lies beside it.

    Raises:
        FileNotFoundError: if the folder holds no log.
    """
    return all_logs(run)[-1]


def logs_of_run(run: str | Path) -> list[Path]:
    """The newest log and the logs of the starts that it continues, the oldest first. Each start of a run has a log.

    Raises:
        FileNotFoundError: if the folder holds no log.
    """
    *older, newest = all_logs(run)
    logs = [newest]
    while older and resumed(logs[0]):
        logs.insert(0, older.pop())
    return logs


def all_logs(run: str | Path) -> list[Path]:
    logs = sorted(Path(run).glob('*/vis_data/scalars.json'))
    if not logs:
        raise FileNotFoundError(f'no training log (*/vis_data/scalars.json) in {run}')
    return logs


def resumed(log: Path) -> bool:
    """Whether a start continued from a checkpoint. If its run.json does not say so, whether its config asked for it."""
    noted = log.parents[1] / 'run.json'
    weights = json.loads(noted.read_text()).get('weights') if noted.exists() else None
    if weights is not None:  # --resume with nothing to resume begins anew
        return any(file['role'] == 'resume' for file in weights)
    config = log.with_name('config.py')
    return config.exists() and re.search(r'^resume = True', config.read_text(), re.MULTILINE) is not None


def read_scalars(run: str | Path) -> list[dict]:
    """All rows that a run logged, in order; each has a ``step``. A step that was repeated after a restart counts once.

    Raises:
        FileNotFoundError: if the folder holds no log.
    """
    rows = [json.loads(line) for log in logs_of_run(run) for line in log.read_text().splitlines()]
    latest = {(row['step'], 'loss' in row): row for row in rows}
    return sorted(latest.values(), key=lambda row: (row['step'], 'loss' not in row))


def read_scores(run: str | Path) -> list[dict]:
    """The validations of a run, in order: their ``step`` and scores, without timings."""
    return [{k: v for k, v in row.items() if k not in LOGGED_BESIDE_SCORES} | dict(step=row['step'])
            for row in read_scalars(run) if 'loss' not in row]


def curve(run: str | Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity."""
    rows = [row for row in read_scalars(run) if key in row]
    return [row['step'] for row in rows], [row[key] for row in rows]


def settings(args: argparse.Namespace) -> dict:
    """The options that a record depends on: all but paths of this machine."""
    return {name: value for name, value in vars(args).items() if name not in ('out', 'data_root', 'config')}


def save(path: str | Path, data: dict) -> None:
    """Writes a record as JSON; a file that is there is replaced once the new one is whole."""
    write_atomically(path, (json.dumps(data, indent=1, sort_keys=True) + '\n').encode())


def exit_if_failed(rows: Iterable[dict]) -> None:
    """Ends the program with a message if one of ``rows`` failed. Rows that were skipped have not failed."""
    failed = [row for row in rows if row.get('note', '').startswith('failed')]
    if failed:
        raise SystemExit(f'{len(failed)} rows failed, the first: {failed[0]}')
