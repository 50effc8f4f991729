from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor
from torch.distributed.tensor import DTensor

from adala_mm.engine.gathering import GatheringHook
from adala_mm.engine.sharded_runner import shard_like, whole
from adala_mm.registry import HOOKS

KEY = 'pending_gradients'


def pending_steps(wrapper: OptimWrapper) -> int:
    """Iterations whose gradients wait for the update that ends their accumulation."""
    count = getattr(wrapper, '_accumulative_counts', 1)  # several wrappers in one have none
    return 0 if count == 1 or wrapper.should_update() else wrapper._inner_count % count


@HOOKS.register_module()
class PendingGradientsHook(GatheringHook):
    """Saves the gradients summed so far in a checkpoint that falls between two updates.

    With ``accumulative_counts=4`` an epoch of 1,251 iterations ends three iterations after an update. MMEngine would
    save the weights alone, and a resumed run would lose these three iterations. Here the file has them as well, as long
    as it is not a multiple of ``accumulative_counts``: as much again as the trainable weights take.

    Several processes have a sum each until the update. Before a checkpoint they take the mean of these sums, which
    leaves the mean of the update as it is; so any number of processes can go on.
    """

    priority = 'LOW'  # before CheckpointHook: only the first process writes, and all must take the mean

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.loaded: dict[str, Any] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.loaded = checkpoint.get(KEY)

    def before_train(self, runner: Runner) -> None:
        loaded, self.loaded = self.loaded, None
        if loaded is None or not runner.iter:  # what a run only starts from
            return
        parameters, gradients = named_parameters(runner), loaded['gradients']
        count = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        if count != loaded['accumulative_counts']:
            lost = f"accumulative_counts is {count}, and was {loaded['accumulative_counts']}"
        elif any(name not in parameters or parameters[name].shape != value.shape for name, value in gradients.items()):
            lost = 'the model has other parameters'
        else:
            for name, value in gradients.items():
                parameters[name].grad = shard_like(value.to(parameters[name].device), parameters[name])
            runner.logger.info(f'No gradient is lost: those of {loaded["steps"]} iterations are in the checkpoint')
            return
        runner.logger.warning(f'The checkpoint has gradients of {loaded["steps"]} iterations that wait for an update. '
                              f'They are left out: {lost}')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.gradients = {}  # the optimizer drops its own after the update

    def gather(self, runner: Runner) -> None:
        if not pending_steps(runner.optim_wrapper):
            return
        parameters = named_parameters(runner)
        names = {name for name, parameter in parameters.items() if parameter.grad is not None}
        names = set().union(*all_gather_object(names))  # processes may have used different ones
        for name, parameter in parameters.items():
            if name in names:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if not isinstance(parameter.grad, DTensor):  # which are means already
                    all_reduce(parameter.grad, op='mean')
                self.gradients[name] = whole(parameter.grad)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.gradients:
            checkpoint[KEY] = dict(
                steps=pending_steps(runner.optim_wrapper),
                accumulative_counts=runner.optim_wrapper._accumulative_counts,
                gradients={name: value.cpu() for name, value in self.gradients.items()})


def named_parameters(runner: Runner) -> dict[str, Tensor]:
    """By their names in a state dict, without a wrapper's."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return dict(model.named_parameters())
