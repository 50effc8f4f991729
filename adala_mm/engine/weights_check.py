from __future__ import annotations

from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from adala_mm.registry import HOOKS
from adala_mm.utils.fingerprint import fingerprint


@HOOKS.register_module()
class WeightsCheckHook(Hook):
    """Before the first training step: the weights are those that were loaded, and the same on every process.

    Backbones note what they loaded (``loaded``, keys and fingerprint). Something that initialises a model again after
    its weights have been put in, or processes that did not get them, would otherwise show as a low score days later.

    Raises:
        RuntimeError: naming the network whose weights changed, or the processes that differ.
    """

    priority = 'VERY_LOW'  # after whatever else prepares the model

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        networks = {name or 'model': module for name, module in model.named_modules()}
        networks |= {f'frozen {name}': part for name, part in getattr(model, 'frozen', {}).items()}
        overwritten = runner._resume or runner._load_from  # on purpose, by the checkpoint of a run
        for name, network in networks.items():
            keys, loaded = getattr(network, 'loaded', ((), None))
            if loaded is None or (overwritten and not name.startswith('frozen')):
                continue
            state = network.state_dict()
            found = fingerprint({key: state[key] for key in keys})
            if found != loaded:
                raise RuntimeError(f'{name}: its weights have changed since they were loaded (fingerprint {loaded}, '
                                   f'now {found}). Does something initialise the model again? Load in init_cfg')
        own = fingerprint(model.state_dict() | {f'frozen.{name}.{key}': value for name, part in
                                                getattr(model, 'frozen', {}).items()
                                                for key, value in part.state_dict().items()})
        everyone = all_gather_object(own)
        wrong = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
        if wrong:
            raise RuntimeError(f'processes {wrong} hold other weights than process 0: did all read the same file?')
        runner.logger.info(f'fingerprint of all weights: {own}, the same on {len(everyone)} process(es)')
