from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from adala_mm.engine.ema import leave_validation
from adala_mm.engine.gathering import GatheringHook
from adala_mm.registry import HOOKS

FILE = 'preempted.pth'


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Saves a checkpoint and ends the run on SIGTERM, with which clusters announce the end of a job.

    The checkpoint, ``preempted.pth`` in the work dir, is what ``--resume`` takes up, in the middle of an epoch, an
    accumulation or a validation too. Processes agree on the iteration after which they stop.

    Args:
        signals: names of the signals; ``SIGUSR1`` suits ``sbatch --signal=USR1@120``.
        interval: iterations between two questions whether another process was told to stop; a single process needs
            none. A process' own answer is a tensor of one element, so 10 is free of cost and quick enough for the 30
            seconds that a cluster leaves at least.

    Raises:
        SystemExit: with 128 + the signal's number, after saving.
    """

    priority = 'LOWEST'  # after logging and scheduling of the step

    def __init__(self, signals: tuple[str, ...] = ('SIGTERM',), interval: int = 10) -> None:
        self.signals = [getattr(signal, name) for name in signals]
        self.interval = interval
        self.received = 0
        self.before: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        self.received = 0
        if threading.current_thread() is threading.main_thread():  # the only one that signals reach
            self.before = {number: signal.signal(number, self.note) for number in self.signals}

    def after_train(self, runner: Runner) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if is_main_process():
            Path(runner.work_dir, FILE).unlink(missing_ok=True)  # the run has ended well, and has newer ones

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.leave_if_told(runner, runner.iter + 1, runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.leave_if_told(runner, runner.iter, batch_idx + 1, validating=True)

    def leave_if_told(self, runner: Runner, done: int, turn: int, validating: bool = False) -> None:
        """All processes leave if one was told to, and must call this with the same ``turn``, counted from 1."""
        if get_world_size() > 1:
            if turn % self.interval:
                return
            agreed = torch.tensor(self.received)
            all_reduce(agreed, op='max')
            self.received = int(agreed)
        if self.received:
            if validating:
                leave_validation(runner)
            self.save_and_leave(runner, done)

    def save_and_leave(self, runner: Runner, done: int) -> None:
        name = signal.Signals(self.received).name
        runner.logger.warning(f'{name}: saving {FILE} after iteration {done}, then leaving; continue with --resume')
        for hook in runner.hooks:
            if isinstance(hook, GatheringHook):
                hook.gather(runner)
        runner.save_checkpoint(runner.work_dir, FILE, meta=dict(epoch=runner.epoch, iter=done), by_epoch=False)
        barrier()
        raise SystemExit(128 + self.received)
