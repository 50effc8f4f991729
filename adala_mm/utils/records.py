"""Reads what training runs leave behind, and says what they ran on."""
from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

LOGGED_BESIDE_SCORES = {'step', 'iter', 'time', 'data_time', 'epoch'}


def newest_log(run: str | Path) -> Path:
    """``<work dir>/<time of start>/vis_data/scalars.json`` of a run's last start; the config stands beside it.

    Raises:
        FileNotFoundError: if the folder holds no log.
    """
    return all_logs(run)[-1]


def logs_of_run(run: str | Path) -> list[Path]:
    """The newest log, and those before it that it goes on from, the oldest first: each start of a run has its own.

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
    """Whether a start went on from a checkpoint; where its run.json does not say, whether it was to."""
    noted = log.parents[1] / 'run.json'
    weights = json.loads(noted.read_text()).get('weights') if noted.exists() else None
    if weights is not None:  # --resume with nothing to resume begins anew
        return any(file['role'] == 'resume' for file in weights)
    config = log.with_name('config.py')
    return config.exists() and re.search(r'^resume = True', config.read_text(), re.MULTILINE) is not None


def read_scalars(run: str | Path) -> list[dict]:
    """All that a run logged, in order; each row has a ``step``. What was done again after a restart counts once.

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


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def machine() -> dict[str, str | int]:
    """What a recorded figure depends on beside the code: processor, versions, commit."""
    model = next((line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
                  if line.startswith('model name')), platform.processor()) if os.path.exists('/proc/cpuinfo') else ''
    return dict(cpu=model, cores=os.cpu_count(), python=platform.python_version(), torch=torch.__version__,
                commit=git('rev-parse', '--short', 'HEAD') or 'unknown')


def git_state() -> dict[str, str | bool | None]:
    """Commit of this code, and whether the files differ from it; None outside of a checkout and without git."""
    changes = git('status', '--porcelain')
    return dict(commit=git('rev-parse', 'HEAD') or None, dirty=None if changes is None else bool(changes))


def git(*words: str) -> str | None:
    """What git says of the code that runs, wherever one happens to stand; None if it fails or is not there.

    An installed package may lie in a repository that is not its own, as an environment inside of one: git does not
    track it there, and has nothing to say.
    """
    here = Path(__file__)
    for command in (['ls-files', '--error-unmatch', here.name], words):
        try:
            done = subprocess.run(['git', *command], capture_output=True, text=True, cwd=here.parent)
        except OSError:
            return None
        if done.returncode:
            return None
    return done.stdout.strip()
