"""Reads what training runs leave behind, and says what they ran on."""
from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import torch


def read_scalars(run: str | Path) -> list[dict]:
    """All logged scalars of a run's newest log, in order; each has a ``step``.

    Raises:
        FileNotFoundError: if the folder holds no log.
    """
    logs = sorted(Path(run).glob('*/vis_data/scalars.json'))
    if not logs:
        raise FileNotFoundError(f'no training log (*/vis_data/scalars.json) in {run}')
    return [json.loads(line) for line in logs[-1].read_text().splitlines()]


def curve(run: str | Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity."""
    rows = [row for row in read_scalars(run) if key in row]
    return [row['step'] for row in rows], [row[key] for row in rows]


def machine() -> dict[str, str | int]:
    """What a recorded figure depends on beside the code: processor, versions, commit."""
    model = next((line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
                  if line.startswith('model name')), platform.processor()) if os.path.exists('/proc/cpuinfo') else ''
    try:
        commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True,
                                cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git on this machine
        commit = ''
    return dict(cpu=model, cores=os.cpu_count(), python=platform.python_version(), torch=torch.__version__,
                commit=commit or 'unknown')
