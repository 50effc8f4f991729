from __future__ import annotations

from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner


class GatheringHook(Hook):
    """Base of hooks whose part of a checkpoint is spread over processes, while only the first one writes it.

    ``gather`` is called in all of them before any checkpoint of `CheckpointHook` or `PreemptionHook`.
    """

    def gather(self, runner: Runner) -> None:
        raise NotImplementedError

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if any(isinstance(hook, CheckpointHook) and not hook.by_epoch
               and (hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
                    or hook.save_last and self.is_last_train_iter(runner)) for hook in runner.hooks):
            self.gather(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        super().after_train_epoch(runner)
        self.gather(runner)

    def before_val_epoch(self, runner: Runner) -> None:  # after which the best weights are written
        super().before_val_epoch(runner)
        self.gather(runner)
