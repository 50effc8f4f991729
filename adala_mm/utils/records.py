"""Reads what training runs leave behind, and says what they ran on."""
from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import torch

LOGGED_BESIDE_SCORES = {'step', 'iter', 'time', 'data_time', 'epoch'}


def newest_log(run: str | Path) -> Path:
    """``<work dir>/<time of start>/vis_data/scalars.json`` of a run's last start; the config stands beside it.

    Raises:
        FileNotFoundError: if the folder holds no log.
    """
    logs = sorted(Path(run).glob('*/vis_data/scalars.json'))
    if not logs:
        raise FileNotFoundError(f'no training log (*/vis_data/scalars.json) in {run}')
    return logs[-1]


def read_scalars(run: str | Path) -> list[dict]:
    """All logged scalars of a run's newest log, in order; each has a ``step``.

    Raises:
        FileNotFoundError: if the folder holds no log.
    """
    return [json.loads(line) for line in newest_log(run).read_text().splitlines()]


def read_scores(run: str | Path) -> list[dict]:
    """The validations of a run's newest log, in order: their ``step`` and scores, without timings."""
    return [{k: v for k, v in row.items() if k not in LOGGED_BESIDE_SCORES} | dict(step=row['step'])
            for row in read_scalars(run) if 'loss' not in row]


def curve(run: str | Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity."""
    rows = [row for row in read_scalars(run) if key in row]
    return [row['step'] for row in rows], [row[key] for row in rows]


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
    """What git says of the code that runs, wherever one happens to stand; None if it fails or is not there."""
    try:
        done = subprocess.run(['git', *words], capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()
