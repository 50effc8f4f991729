"""Checkpoints of a plain training loop: all that a run needs to go on as if nothing had happened."""
from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast_object_list, is_main_process

from adala_mm.utils.atomic import write_atomically
from adala_mm.utils.checkpoint import load_checkpoint


def write_run(path: str | Path, run: dict[str, Any], parts: Mapping[str, Any], progress: dict[str, Any]) -> None:
    """Replaces the file once the new one is whole; called in every process, written by rank 0.

    Args:
        run: what sets this run apart from others.
        parts: what has a ``state_dict``, the model first of all.
        progress: how far the run has come.

    Raises:
        OSError: in every process, if there is no space.
    """
    state = {'run': run, **{name: part.state_dict() for name, part in parts.items()}, **progress}

    def write() -> None:
        torch.save(state, buffer := io.BytesIO())
        write_atomically(path, buffer.getbuffer())

    on_rank_0(write)


def on_rank_0(work: Callable[[], Any]) -> Any:
    """What ``work`` gives on rank 0, whose disk the others may not have; so that none waits for another, its error too.

    Raises:
        OSError, ValueError: in every process, what ``work`` raises on rank 0.
    """
    result = [None, None]
    if is_main_process():
        try:
            result[0] = work()
        except (OSError, ValueError) as error:
            result[1] = error
    broadcast_object_list(result)
    found, error = result
    if error is not None:
        raise error
    return found


def read_run(path: str | Path | None, run: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """What the run is to go on from, for every process as rank 0 finds it; None if it starts.

    Raises:
        ValueError: for ``resume`` without a path, and for a file of another run.
        FileExistsError: for a file that would be overwritten.
    """
    if path is None:
        if resume:
            raise ValueError('resume=True needs a checkpoint')
        return None
    return on_rank_0(lambda: find_run(path, run, resume))


def find_run(path: str | Path, run: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """`read_run` in one process."""
    if not Path(path).exists():
        return None
    if not resume:
        raise FileExistsError(f'{path} exists: say resume=True to go on from it, or name another checkpoint')
    saved = load_checkpoint(path)
    if not isinstance(saved, dict) or not isinstance(saved.get('run'), dict):
        raise ValueError(f'{path} is no checkpoint of align')
    if other := [f'{name}={saved["run"].get(name)!r}, not {value!r}' for name, value in run.items()
                 if saved['run'].get(name) != value]:
        raise ValueError(f'{path} is of another run, with {"; ".join(other)}: name another checkpoint')
    return saved


def restore_run(saved: dict[str, Any], parts: Mapping[str, Any]) -> None:
    """Every part is what it was when ``saved`` was written.

    Raises:
        ValueError: for weights of another model.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f'the checkpoint is of another model: {error}') from error
