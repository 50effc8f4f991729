"""Hooks for runs that are to fail: one writes down what each step saw, the other does the harm."""
from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module(force=True)
class Diary(Hook):
    """One line of ``diary.jsonl`` per training step: iteration, number of the batch, images, their sum, loss."""

    priority = 'VERY_LOW'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        images = [Path(sample.img_path).name for sample in data_batch['data_samples']]
        pixels = sum(float(image.sum()) for image in data_batch['inputs'])
        rank = os.environ.get('RANK', '0')
        with open(Path(runner.work_dir, f'diary{"" if rank == "0" else rank}.jsonl'), 'a') as file:
            print(json.dumps([runner.iter, batch_idx, images, pixels, outputs['loss'].item()]), file=file)


class Killed(Exception):
    pass


@HOOKS.register_module(force=True)
class Saboteur(Hook):
    """Does ``what`` at ``when`` of iteration ``at``, in process ``rank``.

    ``when``: ``batch`` (data are there), ``optimizer`` (gradients are there), ``step`` (all is done), ``validation``,
    ``half`` (half of a checkpoint is written), ``written`` (all of it, under its temporary name), ``renamed``.
    ``what``: ``kill`` (SIGKILL to itself), ``terminate`` (SIGTERM to itself), ``worker`` (SIGKILL to a worker),
    ``wait`` (makes a file ``waiting`` and waits for a signal), ``raise`` (`Killed`, which stands in for SIGKILL in a
    process that is to go on), ``nan`` (an image), ``inf`` (a gradient).
    """

    priority = 'LOWEST'

    def __init__(self, what: str, when: str, at: int, rank: int = 0) -> None:
        self.what, self.when, self.at, self.rank = what, when, at, rank

    def before_train(self, runner):
        self.runner = runner
        if self.when == 'optimizer':
            self.before(runner.optim_wrapper, 'step', lambda *args, **kwargs: self.strike('optimizer', runner.iter))
        elif self.when in ('half', 'written', 'renamed'):
            self.before(os, 'fsync', lambda file: self.writing(file, runner.iter + 1))
            self.before(os, 'replace', lambda part, path: self.renaming(part, path, runner.iter + 1))

    @staticmethod
    def before(owner: object, name: str, harm: Callable) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: (harm(*args, **kwargs), original(*args, **kwargs))[1])

    def writing(self, file: int, at: int) -> None:
        if self.when == 'half' and at == self.at and os.readlink(f'/proc/self/fd/{file}').endswith('.pth.part'):
            os.ftruncate(file, os.fstat(file).st_size // 2)
            self.strike('half', at)

    def renaming(self, part: str, path: str, at: int) -> None:
        if str(path).endswith('.pth'):
            self.strike('written', at)
            if (self.when, self.at) == ('renamed', at):
                os.rename(part, path)
                self.strike('renamed', at)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.strike('batch', runner.iter, data_batch)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.strike('step', runner.iter)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.strike('validation', runner.iter)

    def strike(self, when: str, at: int, batch: dict | None = None) -> None:
        if (when, at) != (self.when, self.at) or os.environ.get('RANK', '0') != str(self.rank):
            return
        if self.what == 'nan':
            batch['inputs'][0] = torch.full_like(batch['inputs'][0], float('nan'), dtype=torch.float32)
        elif self.what == 'inf':
            next(p for p in self.runner.model.parameters() if p.grad is not None).grad.fill_(float('inf'))
        elif self.what == 'wait':
            Path(self.runner.work_dir, 'waiting').touch()
            signal.pause()
        elif self.what == 'raise':
            raise Killed
        else:
            number = signal.SIGTERM if self.what == 'terminate' else signal.SIGKILL
            os.kill(multiprocessing.active_children()[0].pid if self.what == 'worker' else os.getpid(), number)
