"""Scripts and functions in processes of their own, and a process as it was before."""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.utils.data._utils

from helpers import ROOT


def put_back(patch: pytest.MonkeyPatch) -> None:
    """What MMEngine keeps for a process' lifetime is put back when ``patch`` ends; until then, short runs are short."""
    from mmengine.logging import MessageHub, MMLogger
    from mmengine.registry import DefaultScope
    from mmengine.runner.checkpoint import CheckpointLoader
    from mmengine.visualization import Visualizer
    from mmseg.visualization import SegLocalVisualizer  # noqa: F401  one of the subclasses
    for manager in (DefaultScope, MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
        patch.setattr(manager, '_instance_dict', manager._instance_dict.copy())
    patch.setattr(CheckpointLoader, '_schemes', CheckpointLoader._schemes.copy())
    # Most of their time: compilers are asked for their versions, and the config is laid out for log and checkpoints.
    patch.setattr('mmengine.runner.runner.collect_env', dict)
    patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **kwargs: (text, True))


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """What runs leave in the process is put back."""
    with pytest.MonkeyPatch.context() as patch:
        put_back(patch)
        yield


@contextlib.contextmanager
def fresh_process() -> Iterator[None]:
    """What MMEngine keeps for a process' lifetime is put back."""
    with pytest.MonkeyPatch.context() as patch:
        put_back(patch)
        patch.setattr('mmengine.dataset.base_dataset.gc', SimpleNamespace(collect=int))  # takes long
        yield


def gloo_threads() -> list[Path]:
    """Of this process."""
    return [thread for thread in Path('/proc/self/task').iterdir() if 'gloo' in (thread / 'comm').read_text()]


def _run_script(script: Path, words: list[str], place: Path, log: Path, environment: dict[str, str]) -> None:
    from mmengine.logging import MessageHub, MMLogger
    from mmengine.registry import DefaultScope
    from mmengine.visualization import Visualizer
    with open(log, 'w') as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, 'w', buffering=1, closefd=False) for number in (1, 2))
    os.environ.update(environment)
    os.chdir(place)
    sys.path.insert(0, str(place))
    torch.set_num_threads(1)
    for manager in (DefaultScope, MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
        manager._instance_dict.clear()  # of runs before this one
    sys.argv = [script.name, *words]
    with pytest.MonkeyPatch.context() as patch:
        put_back(patch)
        patch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)  # two at the end of every epoch
        runpy.run_path(str(script), run_name='__main__')
    print(f'{len(gloo_threads())} threads of gloo are left')  # the end of the interpreter would meet them


def start_script(script: str, *words: str, place: Path, log: Path, **environment: str) -> multiprocessing.Process:
    """A script of this repository with ``words``, in a process forked off this one, where all imports are done.

    Starting up takes several seconds of a process of its own: those are for tests of what is imported, and in which
    order. Fork after all imports.

    Args:
        place: its working directory, where it may import from.
        log: file that gets what it prints.
        environment: what its launcher would add.
    """
    process = multiprocessing.get_context('fork').Process(
        target=_run_script, args=(ROOT / script, list(map(str, words)), place, log, environment))
    process.start()
    return process


def wait_for(*processes: multiprocessing.Process) -> list[int]:
    """Exit codes of processes, of which none is left."""
    try:
        for process in processes:
            process.join(timeout=600)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def exit_codes(target: Callable[..., None], *args: object) -> list[int]:
    """Of two processes forked off this one, where all imports are done: each calls ``target(rank, *args)``."""
    processes = [multiprocessing.get_context('fork').Process(target=target, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    return wait_for(*processes)


def dies_at_two(job: dict) -> dict:
    """A job for `side_by_side`, whose processes import it."""
    if job['n'] == 2:
        os._exit(1)
    return dict(square=job['n'] ** 2)
