"""Builds what MMEngine's runner builds before the first step, by its own methods, for all planned processes."""
from __future__ import annotations

import copy
import logging
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from mmengine.visualization import Visualizer

from adala_mm.preflight.plan import TRAIN, VAL, Plan
from adala_mm.preflight.report import Skipped, one_line

FOR_GPUS = 'dtype', 'loss_scale', 'use_fsdp'  # options of an AmpOptimWrapper, which cannot be built without a GPU


class Rehearsal(Runner):
    """A runner with loops, optimizer, schedulers and hooks, and without a work dir, log files, weights or devices."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.cfg, self.model = plan, plan.cfg, plan.model
        self.logger = logging.getLogger(__name__)
        self._world_size, self._experiment_name, self._log_dir = plan.processes, 'rehearsal', plan.cfg.work_dir
        self._hooks: list[Hook] = []
        self.param_schedulers = None
        self.visualizer = SimpleNamespace()  # loops note the data set's classes there
        self._train_dataloader, self._train_loop, self._val_loop = plan.cfg[TRAIN], None, None

    def part(self, name: str) -> Any:
        """A part that another one needs. That it cannot be built is told once, where it is asked for itself.

        Raises:
            Skipped: if it cannot be built.
        """
        try:
            return getattr(self, name)
        except Skipped:
            raise
        except Exception as error:
            raise Skipped(f'what it needs cannot be built: {one_line(error)[:100]}') from error

    @cached_property
    def trained(self) -> BaseLoop:
        """The training loop over all batches of one process."""
        self._train_dataloader = self.plan.dataloader(TRAIN, self.plan.processes)
        if not len(self._train_dataloader):
            raise Skipped('the loader gives no batch')
        self._train_loop = self.build_train_loop(copy.deepcopy(self.cfg.train_cfg))
        return self._train_loop

    @cached_property
    def validated(self) -> BaseLoop | None:
        """The validation loop with its metrics; None without validation."""
        if not self.cfg.get(VAL):
            return None
        self._val_dataloader = self.plan.dataloader(VAL, self.plan.processes)
        self._val_evaluator = copy.deepcopy(self.cfg.val_evaluator)
        return self.build_val_loop(copy.deepcopy(self.cfg.val_cfg))

    @cached_property
    def optimized(self) -> Any:
        """The optimizer with its parameter groups, at the rate that ``auto_scale_lr`` makes."""
        wrapper = copy.deepcopy(self.cfg.optim_wrapper)
        if wrapper.get('type') == 'AmpOptimWrapper' and not torch.cuda.is_available():
            wrapper = {key: value for key, value in wrapper.items() if key not in FOR_GPUS} | dict(type='OptimWrapper')
        wrapper = self.build_optim_wrapper(wrapper)
        self.scale_lr(wrapper, self.cfg.get('auto_scale_lr'))
        return wrapper

    @cached_property
    def scheduled(self) -> list:
        """Schedulers of the optimizer, in the units in which they step."""
        self.optim_wrapper, _ = self.part('optimized'), self.part('trained')
        found = self.build_param_scheduler(copy.deepcopy(self.cfg.get('param_scheduler') or []))
        return found if isinstance(found, list) else [one for several in found.values() for one in several]

    @cached_property
    def hooked(self) -> list[Hook]:
        """Default and custom hooks, as configured; none of them has run."""
        drawing = copy.deepcopy(self.cfg.get('visualizer') or dict(type='Visualizer'))
        drawing = self.build_visualizer(dict(drawing, name=self._experiment_name))  # writes nothing until it draws
        try:
            self.register_hooks(
                copy.deepcopy(self.cfg.get('default_hooks')), copy.deepcopy(self.cfg.get('custom_hooks')))
        finally:
            for kind in {type(drawing), Visualizer}:  # or hooks of a real run would find it
                kind._instance_dict.pop(self._experiment_name)
        return self._hooks

