from __future__ import annotations

from collections.abc import Iterator

from mmengine.dist import all_gather_object, get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adala_mm.registry import HOOKS
from adala_mm.utils.fingerprint import fingerprint
from adala_mm.utils.normalisation import other_normalisation


def loaded_networks(model: nn.Module) -> dict[str, nn.Module]:
    """The networks of a model, frozen ones included, that noted what they had loaded (``loaded``)."""
    networks = {name or 'model': module for name, module in model.named_modules()}
    networks |= {f'frozen {name}': part for name, part in getattr(model, 'frozen', {}).items()}
    return {name: network for name, network in networks.items() if getattr(network, 'loaded', None) is not None}


@HOOKS.register_module()
class WeightsCheckHook(Hook):
    """Checks before the first step that the weights are those that were loaded, and equal on all processes.

    Backbones note what they loaded (``loaded``, keys and fingerprint). Something that initialises a model again after
    its weights have been put in, or processes that did not get them, would otherwise show as a low score days later.
    Every process checks its weights before training and, as some things happen only then, after its first forward.
    Where the weights say by which mean and std their images were normalised, another data_preprocessor is a warning.

    Raises:
        RuntimeError: naming the network whose weights changed, or the processes that differ.
    """

    priority = 'VERY_LOW'  # after whatever else prepares the model

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        overwritten = runner._resume or runner._load_from  # on purpose, by the checkpoint of a run
        for name, network in loaded_networks(model).items():
            if overwritten and not name.startswith('frozen'):
                continue
            keys, loaded = network.loaded
            state = network.state_dict()
            found = fingerprint({key: state[key] for key in keys})
            if found != loaded:
                raise RuntimeError(f'{name}: its weights have changed since they were loaded (fingerprint {loaded}, '
                                   f'now {found}). Does something initialise the model again? Load in init_cfg')
        for difference, fix in sorted(set(self.normalisation(model))):
            runner.logger.warning(f'{difference}: {fix}')
        own = self.fingerprint_of(model, model.state_dict())
        everyone = all_gather_object(own)
        wrong = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
        if wrong:
            raise RuntimeError(f'processes {wrong} hold other weights than process 0: did all read the same file?')
        runner.logger.info(f'fingerprint of all weights: {own}, the same on {len(everyone)} process(es)')
        self.watch_first_forward(model)

    @staticmethod
    def normalisation(model: nn.Module) -> Iterator[tuple[str, str]]:
        """How the images of this model differ from those that its networks were pretrained on, and the fix."""
        preprocessor = getattr(model, 'data_preprocessor', None)
        values = [getattr(preprocessor, name, None) for name in ('mean', 'std')]
        mean, std = (None if value is None else value.flatten().tolist() for value in values)
        for network in loaded_networks(model).values():
            checkpoint = (getattr(network, 'init_cfg', None) or {}).get('checkpoint')
            if checkpoint and (found := other_normalisation(checkpoint, mean, std)):
                yield found

    @staticmethod
    def fingerprint_of(model: nn.Module, own: dict[str, Tensor]) -> str:
        """Of ``own``, weights of the model, and all those of its teacher."""
        return fingerprint(own | {f'frozen.{name}.{key}': value for name, part in getattr(model, 'frozen', {}).items()
                                  for key, value in part.state_dict().items()})

    def watch_first_forward(self, model: nn.Module) -> None:
        """Parameters must be the same after it; a forward may well change buffers (batch norm)."""
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            return  # sharded: after it, some are gathered and some are not

        def note(module: nn.Module, args: tuple) -> None:
            first.remove()
            nonlocal before  # not earlier: a validation before training may swap in an average (EMAHook)
            before = self.fingerprint_of(model, dict(model.named_parameters()))

        def check(module: nn.Module, args: tuple, output: object) -> None:
            handle.remove()
            after = self.fingerprint_of(model, dict(model.named_parameters()))
            if after != before:
                raise RuntimeError(f'process {get_rank()}: the weights have changed in the first forward (fingerprint '
                                   f'{before}, now {after}). Does something initialise the model there?')

        before = None
        first = model.register_forward_pre_hook(note)
        handle = model.register_forward_hook(check)
