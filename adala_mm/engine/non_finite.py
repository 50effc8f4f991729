from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from adala_mm.registry import HOOKS

POLICIES = ('stop', 'skip')
LEAST_SCALE = 1e-4  # of float16's dynamic loss scaling, which begins at 65536: 30 halvings in a row


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_finite(value: object) -> bool:
    """Whether all floating-point tensors in ``value``, nested in lists, tuples and dicts, are finite."""
    if isinstance(value, Tensor):
        value = local(value)
        return not value.is_floating_point() or bool(value.isfinite().all())
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return all(is_finite(part) for part in parts)


def largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in ``tensors``, a scalar; NaN if there is one. In one pass, and unlike a sum never inf."""
    parts = [part for part in map(local, tensors) if part.numel()]  # a small tensor's shards may be empty
    return torch.nn.utils.get_total_norm(parts, norm_type=float('inf'))


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def averages_batches(model: nn.Module) -> bool:
    """Whether it has a SyncBatchNorm, PyTorch's or mmcv's, and several processes to use it with."""
    return get_world_size() > 1 and any(type(module).__name__ == 'SyncBatchNorm' for module in model.modules())


@contextmanager
def noting_errors(found: list[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, it must not hide what this is about
        found.append(f'unknown, as running the batch again fails ({type(error).__name__}: {error})')


def first_not_finite(model: nn.Module, wrapper: OptimWrapper, batch: dict) -> str | None:
    """Where ``batch`` first stops being finite: a weight, the images, a module's output, a loss term, a gradient.

    For the last three it is run once more, watching every module. As a loss may be averaged over processes, all of
    them must call this together, and run it together: none does when one has the answer already, or when the model
    itself averages over processes (sharded, SyncBatchNorm). None if nothing is found.
    """
    known = next((f'the weight {name}' for name, p in model.named_parameters() if not is_finite(p)), None)
    if known is None and not is_finite(batch.get('inputs')):
        known = 'the images themselves'
    if any(all_gather_object(known)) or is_sharded(model) or averages_batches(model):
        return known
    found: list[str] = []

    def watch(name: str, module: nn.Module, args: tuple, output: object) -> None:
        if not found and not is_finite(output):
            found.append(f'the output of {name}')

    handles = [module.register_forward_hook(partial(watch, name)) for name, module in model.named_modules() if name]
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == 'cuda' else []):
            with noting_errors(found):
                with wrapper.optim_context(model), torch.compiler.set_stance('force_eager'):
                    losses = model(**batch)
                found += [f'the loss term {name}' for name, value in losses.items() if not is_finite(value)]
            if any(all_gather_object(bool(found))):
                return found[0] if found else None
            with noting_errors(found):
                loss, _ = BaseModel.parse_losses(model, losses)  # the model's own may talk to other processes
                if hasattr(wrapper, 'loss_scaler'):
                    loss = wrapper.loss_scaler.scale(loss)
                learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
                grads = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
                # Backwards, so from the end: what comes before it in the network has caught it.
                found += [f'the gradient of {name}' for name, grad in reversed(list(zip(learning, grads, strict=True)))
                          if grad is not None and not is_finite(grad)]
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def files_of(batch: dict) -> list[str]:
    """Files of a batch; of those images alone that are not finite, if there are any."""
    images, samples = batch.get('inputs'), batch.get('data_samples') or []
    files = [str(sample.get('img_path', f'image {i} of the batch')) for i, sample in enumerate(samples)]
    if isinstance(images, Tensor) and len(files) == len(images):
        files = [file for file, image in zip(files, images, strict=True) if not is_finite(image)] or files
    return files


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Keeps NaN and infinity out of the weights: if loss or gradients have one, no process takes the step.

    MMEngine calls no hook between backward pass and step, so this one stands in the optimizer wrapper, before
    gradients are clipped. It costs a pass over the gradients and one number exchanged and read per step; MMEngine
    reads the loss in each iteration anyway. Then, and only then, the batch is run once more to find the block, unless
    the model itself averages over processes (sharded, SyncBatchNorm).

    Gradients that overflow in float16 are no fault: ``AmpOptimWrapper`` lowers its dynamic loss scale and leaves that
    step out by itself. They are one when the scale has fallen below 1e-4.

    When gradients are accumulated, a batch whose loss is not finite counts as 0 in the sum, and the others are kept.
    Gradients that are not finite can no longer be told apart: their whole step is left out (as it is, for either
    reason, of a sharded model). Statistics of batch norm are put back to what they were before the batch.

    Before a checkpoint is written (and an older one deleted for it), the weights are checked too.

    Args:
        policy: ``stop`` raises, ``skip`` warns and goes on without the step.
        max_skipped: of ``skip``: as many bad batches in a row are tolerated, one more stops.

    Writes ``non_finite_iter_<n>.json`` to the work dir: for every process the first place that was not finite, the
    loss and the files of the batch. Logs ``skipped``, the number of batches left out so far.

    Raises:
        ValueError: for an unknown ``policy``.
        RuntimeError: on all processes, naming iteration, process, block, files and the last checkpoint.
    """

    def __init__(self, policy: str = 'stop', max_skipped: int = 10) -> None:
        if policy not in POLICIES:
            raise ValueError(f'unknown policy {policy!r}; choose one of {", ".join(POLICIES)}')
        self.policy, self.max_skipped = policy, max_skipped

    def before_train(self, runner: Runner) -> None:
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        self.skipped = self.in_a_row = 0
        self.accumulates = runner.optim_wrapper._accumulative_counts > 1
        self.separable = self.accumulates and not is_sharded(self.model)
        self.forget()
        # What the model gets, after its preprocessor; the loop's own batch cannot be preprocessed twice.
        self.watch = self.model.register_forward_pre_hook(self.keep_batch, with_kwargs=True)
        runner.optim_wrapper.backward = partial(self.backward, runner)
        runner.optim_wrapper.step = partial(self.step, runner)

    def after_train(self, runner: Runner) -> None:
        self.watch.remove()
        del runner.optim_wrapper.backward, runner.optim_wrapper.step

    def forget(self) -> None:
        """A new step begins, of one batch or of several."""
        self.batch, self.files, self.good = {}, [], 0

    def keep_batch(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get('mode') == 'loss' and model.training:
            self.batch = kwargs
            self.statistics = [{key: value.clone() for key, value in norm.named_buffers()} for norm in self.norms]

    def backward(self, runner: Runner, loss: Tensor, **kwargs) -> None:
        """In the place of the optimizer wrapper's."""
        wrapper, self.loss = runner.optim_wrapper, loss.detach()
        self.files += files_of(self.batch) if self.accumulates else []
        # One batch per step: step() looks at loss and gradients together, and nothing is lost by the backward pass.
        if self.separable and self.anywhere(~self.loss.isfinite()):
            self.refuse(runner)
            # A loss of 0 that depends on every parameter: DDP still averages what has been accumulated before.
            loss = sum((0 * p).sum() for p in self.model.parameters() if p.requires_grad)
        else:
            self.good += 1
        type(wrapper).backward(wrapper, loss, **kwargs)

    def step(self, runner: Runner, **kwargs) -> None:
        """In the place of the optimizer wrapper's, which zeroes the gradients afterwards in any case."""
        wrapper = runner.optim_wrapper
        scaler = getattr(wrapper, 'loss_scaler', None)
        dynamic = scaler is not None and scaler.is_enabled() and wrapper._scale_update_param is None
        bad = ~self.loss.isfinite() & (not self.separable)
        if not dynamic:
            bad = bad | ~largest([p.grad for p in self.model.parameters() if p.grad is not None]).isfinite()
        if self.anywhere(bad):
            self.refuse(runner)
        elif self.good:
            type(wrapper).step(wrapper, **kwargs)
            if dynamic and scaler.get_scale() < LEAST_SCALE:
                raise RuntimeError(self.describe(runner, f'the loss scale has fallen to {scaler.get_scale():.0e}: '
                                                         'gradients are not finite at any scale. Use bfloat16 (--amp)'))
            self.in_a_row = 0
        self.forget()

    @staticmethod
    def anywhere(bad: Tensor) -> bool:
        """Whether ``bad`` holds on any process."""
        bad = bad.float()
        all_reduce(bad, op='max')
        return bool(bad)

    def refuse(self, runner: Runner) -> None:
        """Reports the current batch, and stops if the policy is to."""
        before = self.statistics  # describe() runs the batch again, which changes both
        message = self.describe(runner, 'loss or gradients are not finite')
        for norm, statistics in zip(self.norms, before, strict=True):
            for key, value in statistics.items():
                getattr(norm, key).copy_(value)
        self.skipped += 1
        self.in_a_row += 1
        if self.policy == 'stop':
            raise RuntimeError(f'{message}. A lower learning rate, clip_grad, or bfloat16 instead of float16 may help; '
                               "NonFiniteHook's policy='skip' goes on without such batches")
        if self.in_a_row > self.max_skipped:
            raise RuntimeError(f'{self.in_a_row} batches in a row could not be used (max_skipped={self.max_skipped}). '
                               f'Of the last one: {message}')
        runner.logger.warning(f'{message}. Skipped, {self.skipped} so far')
        runner.message_hub.update_scalar('train/skipped', self.skipped)

    def describe(self, runner: Runner, what: str) -> str:
        """One message for all processes, and the record of their batches."""
        where = first_not_finite(self.model, runner.optim_wrapper, self.batch)
        where = where or (None if self.loss.isfinite() else 'the loss')
        everyone = all_gather_object(dict(process=get_rank(), first=where, loss=str(self.loss.item()),
                                          files=files_of(self.batch), step_files=self.files))
        record = Path(runner.work_dir, f'non_finite_iter_{runner.iter + 1}.json')
        if is_main_process():
            record.write_text(json.dumps(dict(iteration=runner.iter + 1, processes=everyone), indent=1))
        guilty = [each for each in everyone if each['first']]
        places = '; '.join(f'process {each["process"]}: first {each["first"]} (loss {each["loss"]}), files '
                           f'{", ".join(each["files"])}' for each in guilty)
        names = [name for name, p in self.model.named_parameters() if p.grad is not None and not is_finite(p.grad)]
        places = places or ('no process finds it when it runs its batch again; last of the gradients that are not '
                            f'finite: {names[-1] if names else "none"}')
        return (f'iteration {runner.iter + 1}: {what}. {places}. The weights are as they were before this step; last '
                f'good checkpoint: {self.last_checkpoint(runner)}; files of all processes: {record}')

    @staticmethod
    def last_checkpoint(runner: Runner) -> str:
        return find_latest_checkpoint(runner.work_dir) or 'none yet'

    def after_train_epoch(self, runner: Runner) -> None:
        self.check_weights(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        if any(isinstance(hook, CheckpointHook) and not hook.by_epoch and (
                self.every_n_train_iters(runner, hook.interval) or self.is_last_train_iter(runner))
               for hook in runner.hooks):
            self.check_weights(runner)

    def check_weights(self, runner: Runner) -> None:
        """Raises RuntimeError if a finite, but much too large step has broken the weights."""
        if self.anywhere(~largest(list(self.model.parameters())).isfinite()):
            broken = [name for name, parameter in self.model.named_parameters() if not is_finite(parameter)]
            raise RuntimeError(f'iteration {runner.iter + 1}: weights are not finite '
                               f'({", ".join(broken[:5]) or "on another process"}): is the learning rate too high? '
                               f'Nothing has been saved; last good checkpoint: {self.last_checkpoint(runner)}')
