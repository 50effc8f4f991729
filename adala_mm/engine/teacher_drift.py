from __future__ import annotations

import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adala_mm.registry import HOOKS

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


def checksums(tensors: dict[str, Tensor]) -> list[int]:
    """The sum of each tensor's elements read as integers, taken where the tensors are: any single change shows."""
    values = [(v.to_local() if isinstance(v, DTensor) else v).detach() for v in tensors.values()]
    sums = [value.view(INTEGERS[value.element_size()]).sum(dtype=torch.int64) for value in values]
    return torch.stack(sums).tolist() if sums else []


@HOOKS.register_module()
class TeacherDriftHook(Hook):
    """Checks that the teacher stays as it was loaded: no weight or buffer changes, eval mode, no gradients.

    So do the frozen weights of any model, of which the teacher of stage 1 has most. Looked at every ``interval``
    iterations and at the end of training, on every process. One look reads every weight once, where it is, and copies
    one number per tensor: for a ViT-L 2 s on one CPU core, on which 1,000 iterations take days.

    Args:
        interval: iterations between two looks.

    Raises:
        RuntimeError: on all processes, naming the process and the tensors or modules.
    """

    def __init__(self, interval: int = 1000) -> None:
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.teacher: dict[str, nn.Module] = getattr(self.model, 'frozen', {})
        # By name and not by requires_grad later on: what starts to learn has drifted too.
        self.frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        self.reference = dict(zip(self.tensors(), checksums(self.tensors()), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that must not change."""
        parameters = dict(self.model.named_parameters())
        found = {name: parameters[name] for name in self.frozen}
        for role, module in self.teacher.items():
            found |= {f'frozen {role}.{name}': value for name, value in (*module.named_parameters(),
                                                                         *module.named_buffers())}
        return found

    def problems(self) -> list[str]:
        """What is wrong in this process."""
        tensors = self.tensors()
        changed = [name for name, value in zip(tensors, checksums(tensors), strict=True)
                   if value != self.reference.get(name)] + [name for name in self.reference if name not in tensors]
        learning = [name for name, value in tensors.items() if value.requires_grad or value.grad is not None]
        training = [f'frozen {role}.{name}'.rstrip('.') for role, teacher in self.teacher.items()
                    for name, module in teacher.named_modules() if module.training]
        kinds = {'changed': changed, 'with gradients': learning, 'in training mode': training}
        return [f'{kind}: {", ".join(names[:5])}{f" and {len(names) - 5} more" if len(names) > 5 else ""}'
                for kind, names in kinds.items() if names]

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            everyone = all_gather_object(self.problems())
            found = [f'process {rank}: {"; ".join(problems)}' for rank, problems in enumerate(everyone) if problems]
            if found:
                raise RuntimeError(f'iteration {runner.iter + 1}: the teacher or other frozen weights are not what '
                                   f'they were when training began. {". ".join(found)}. Is one of them in the '
                                   'optimizer, or shared with a network that learns?')
