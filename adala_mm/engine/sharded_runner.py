from __future__ import annotations

from typing import Any

from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from adala_mm.models.algorithms import AttentionAlignment
from adala_mm.registry import RUNNERS


@RUNNERS.register_module()
class ShardedRunner(Runner):
    """MMEngine's runner with parameters, gradients and optimizer state sharded over all processes (FSDP).

    Each of ``model.backbone.blocks`` is gathered when it is run and dropped again; what is outside of them is gathered
    for the whole step. The frozen teacher of stage 2 is no submodule and stays whole on every process. Results are
    those of DDP up to the order of sums.

    Checkpoints have the ordinary form in both directions: whole tensors, which any number of processes, sharded or not,
    can resume, and which the next stage starts from. While one is written, every process holds the whole model and
    optimizer state in its *host* memory.

    PyTorch's ``fully_shard`` does the work. MMEngine's own FSDPStrategy is for the FSDP before it, which
    does not run on CPUs, and for another runner, which knows no hook of ours.

    Use: ``runner_type = 'adala_mm.ShardedRunner'`` in a config of stage 2 or 3, and several processes.

    Raises:
        ValueError: for a single process, a model without ``backbone.blocks``, or stage 1, which runs parts of a block
            and differentiates them one by one: it needs the activations of one block only, and DDP.
    """

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if not self.distributed:
            raise ValueError('ShardedRunner has no other process to share the model with: start it with '
                             'tools/dist_train.sh, or take runner_type out of the config')
        if isinstance(model, AttentionAlignment):
            raise ValueError('ShardedRunner cannot run stage 1, which differentiates parts of blocks one by one: use '
                             'DDP (no runner_type)')
        blocks = getattr(getattr(model, 'backbone', None), 'blocks', None)
        if not blocks:
            raise ValueError(f'ShardedRunner shards model.backbone.blocks, which {type(model).__name__} lacks: use '
                             'DDP (no runner_type)')
        model.init_weights()  # while tensors are whole; every process reads the same file
        kind = get_device()
        mesh = init_device_mesh(kind, (self.world_size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
                module.register_state_dict_post_hook(whole_parameters)
                module.register_load_state_dict_pre_hook(shard_parameters)
        return model.to(kind)

    def _init_model_weights(self) -> None:
        """Nothing: `wrap_model` has done it."""

    def build_optim_wrapper(self, optim_wrapper: OptimWrapper | dict) -> OptimWrapper:
        built = super().build_optim_wrapper(optim_wrapper)
        if built is not optim_wrapper:
            built.optimizer.register_state_dict_post_hook(whole_state)
            built.optimizer.register_load_state_dict_pre_hook(shard_state)
        return built

    def resume(self, filename: str, **options: Any) -> None:
        """As MMEngine's, but the whole tensors of a file are read into host memory."""
        super().resume(filename, **options | dict(map_location='cpu'))

    def save_checkpoint(self, *args: Any, save_optimizer: bool = True, **kwargs: Any) -> None:
        """As MMEngine's, on the first process; the others hand it their parts."""
        if is_main_process():
            super().save_checkpoint(*args, save_optimizer=save_optimizer, **kwargs)
        else:
            self.model.state_dict()
            if save_optimizer:
                self.optim_wrapper.state_dict()


def whole(value: Any) -> Any:
    """A sharded tensor put together, in host memory; anything else as it is. All processes must call it together."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def shard_like(value: Any, parameter: Tensor) -> Any:
    """This process' part of a whole tensor that belongs to ``parameter``; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor) or (
            value.shape != parameter.shape):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_parameters(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    for name, _ in module.named_parameters(recurse=False):
        if prefix + name in state:
            state[prefix + name] = whole(state[prefix + name])


def shard_parameters(module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if prefix + name in state:
            state[prefix + name] = shard_like(state[prefix + name], parameter)


def whole_state(optimizer: Optimizer, state: dict) -> dict:
    parts = {i: {key: whole(value) for key, value in part.items()} for i, part in state['state'].items()}
    return state | dict(state=parts)


def shard_state(optimizer: Optimizer, state: dict) -> dict:
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    parts = {i: {key: shard_like(value, parameters[i]) for key, value in part.items()}
             for i, part in state['state'].items()}
    return state | dict(state=parts)
