from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, find_latest_checkpoint

from adala_mm.engine.weights_check import loaded_networks
from adala_mm.registry import HOOKS
from adala_mm.utils.atomic import write_atomically
from adala_mm.utils.checkpoint import checkpoint_sha256
from adala_mm.utils.fingerprint import file_sha256
from adala_mm.utils.machine import default_device, git_state, hardware
from adala_mm.utils.stack import stack_versions
from adala_mm.version import __version__

FILE = 'run.json'


@HOOKS.register_module()
class ProvenanceHook(Hook):
    """Records what a run was in ``<work dir>/<time of start>/run.json``, beside the log of that start.

    ================  =================================================================================================
    command           full command line; ``directory`` is where it was given
    config            file, and the whole of it as it ran (``vis_data/config.py``, dumped by MMEngine) with its SHA-256
    seed              of the run, and whether it was ``deterministic``
    processes         how many trained together
    versions, source  of the stack; commit of this code, and whether files differed from it (``dirty``)
    hardware          processor, threads, device, driver
    weights           every checkpoint file that it started from, with its SHA-256 (None if it is not on this machine)
                      and role: ``init_cfg``, ``load_from`` or ``resume``
    loaded            networks that noted what they had loaded: number of tensors and their fingerprint
    outcome           ``running``, ``finished``, ``interrupted`` or ``failed``, the last two with an ``error``
    started, ended    UTC
    ================  =================================================================================================

    Each start has a file of its own, a resumed one as well, and none is overwritten. One that says ``running`` still
    runs or was killed: `outcome_recorded` sees all other ends. Written by the first process only, atomically.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.record: dict[str, Any] = {}

    def before_run(self, runner: Runner) -> None:
        if not is_main_process():
            return
        folder = Path(runner.log_dir)
        self.path, count = folder / FILE, 1
        while self.path.exists():  # training and testing by one runner, or starts within the same second
            count += 1
            self.path = folder / FILE.replace('.', f'_{count}.')
        dumped = folder / 'vis_data/config.py'
        machine = hardware(default_device())
        machine.pop('commit')
        self.record = dict(
            outcome='running', error=None, started=now(), ended=None,
            command=shlex.join(sys.orig_argv), directory=os.getcwd(),
            config=dict(file=runner.cfg.filename and str(runner.cfg.filename),
                        dumped=str(dumped.relative_to(folder)) if dumped.exists() else None,
                        sha256=file_sha256(dumped) if dumped.exists() else None),
            seed=runner.seed, deterministic=torch.are_deterministic_algorithms_enabled(), processes=get_world_size(),
            source=git_state(), versions=dict(adala_mm=__version__) | stack_versions(), hardware=machine)
        self.write()

    # By now everything is loaded, and therefore on this machine.
    def before_train(self, runner: Runner) -> None:
        self.note_weights(runner, sorted(set(named_checkpoints(runner.cfg.get('model')))))

    def before_test(self, runner: Runner) -> None:
        self.note_weights(runner, [])

    def note_weights(self, runner: Runner, initial: list[str]) -> None:
        if self.path is None:
            return
        roles = dict.fromkeys(initial, 'init_cfg')
        if newest := runner._load_from or (runner._resume and find_latest_checkpoint(runner.work_dir)):
            roles[str(newest)] = 'resume' if runner._resume else 'load_from'
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.record.update(
            weights=[dict(file=name, role=role, sha256=checkpoint_sha256(name)) for name, role in roles.items()],
            loaded={name: dict(tensors=len(network.loaded[0]), fingerprint=network.loaded[1])
                    for name, network in loaded_networks(model).items()})
        self.write()

    def after_run(self, runner: Runner) -> None:
        self.end('finished')

    def end(self, outcome: str, error: str | None = None) -> None:
        if self.path is not None:
            self.record.update(outcome=outcome, error=error, ended=now())
            self.write()

    def write(self) -> None:
        write_atomically(self.path, (json.dumps(self.record, indent=1) + '\n').encode())


@contextlib.contextmanager
def outcome_recorded(runner: Runner) -> Iterator[None]:
    """Has the runner's `ProvenanceHook` write down the ends that MMEngine has no hook for: errors, interruptions."""
    try:
        yield
    except BaseException as error:
        text = f'{type(error).__name__}: {error}'.splitlines()[0]
        outcome = 'interrupted' if isinstance(error, (KeyboardInterrupt, SystemExit)) else 'failed'
        for hook in runner.hooks:
            if isinstance(hook, ProvenanceHook):
                hook.end(outcome, text)
        raise


def now() -> str:
    return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())


def named_checkpoints(node: Any) -> Iterator[str]:
    """Every ``checkpoint`` that a model's config names, at any depth."""
    if isinstance(node, dict):
        if isinstance(node.get('checkpoint'), str):
            yield node['checkpoint']
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return
    for child in node:
        yield from named_checkpoints(child)
