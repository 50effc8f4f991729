"""`align`: the stages of ViT-AdaLA as a plain PyTorch loop, for a model from `linearize`."""
from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, all_reduce_params, broadcast, get_world_size
from torch import Tensor, nn

from adala_mm.adapters import Adapter, Architecture, find_vit
from adala_mm.calibration import calibrate
from adala_mm.linearization import is_linear
from adala_mm.models.algorithms.attention_alignment import compared
from adala_mm.models.algorithms.base import mean_squared_error, relative_error
from adala_mm.pairing import find_pair, first_of, frozen, report, require_whole, restored, steps_in, validated
from adala_mm.utils.batches import Batches
from adala_mm.utils.run_checkpoint import read_run, restore_run, write_run

# ViT-AdaLA Table 5, on 8 GPUs.
LEARNING_RATES = {1: 1e-2, 2: 1e-3}
BATCHES = {1: 8 * 32, 2: 8 * 16}
QKV = re.compile(r'(qkv|[qkv]_proj|[qkv]_bias|attention\.(query|key|value))(\.|$)')


def align(model: nn.Module, teacher: nn.Module, dataloader: Iterable[Any], stage: int | str = 1,
          steps: int | None = None, epochs: int | None = None, lr: float | None = None, weight_decay: float = 0.05,
          loss_scale: float = 1.0, bf16: bool = False, log_interval: int = 50,
          validate: Callable[[nn.Module], Mapping[str, float] | None] | None = None, val_interval: int | None = None,
          checkpoint: str | Path | None = None, checkpoint_interval: int = 1000,
          resume: bool = False) -> list[dict[str, float]]:
    """Brings a linearized ViT back to its softmax original; run stage 1, then, if it pays, calibrate, then stage 2.

    Stage 1: ``loss = mean over replaced blocks of mean (attn_l(h_l) - teacher_l(h_l))^2``, h_l being what the block's
    attention reads in the *teacher*. Queries', keys' and values' projections learn, and what the new attention adds.
    One block is in memory at a time. Stage 2: ``loss = loss_scale * mean (features - teacher's)^2`` on the final
    normalised tokens; everything learns. Same losses as `AttentionAlignment` and `FeatureAlignment`, without their
    hooks (Performer's features are not redrawn). mmpretrain's attentions end after LayerScale, so stage 1 compares
    there.

    In several processes (``torchrun``, after ``torch.distributed.init_process_group``) each calls this with its share
    of the data, such as a ``DataLoader`` with a ``DistributedSampler``, whose epochs are counted here. All start from
    the weights of rank 0; gradients and what is reported are means over processes.

    Args:
        model: from `linearize`; trained in place, on its device and in its dtype.
        teacher: the original, of the same architecture, on the same device. Frozen and in eval mode meanwhile.
        dataloader: yields images (B, 3, H, W), normalised as the ViT inside expects them: a tensor, a tuple or list
            that begins with one, or a dict with ``pixel_values``.
        stage: 1, 2, or ``'calibrate'``: then `adala_mm.calibrate` does the work, with the defaults of its own options.
            It reports, and replaces ``checkpoint``, after each block, and ``val_interval`` counts blocks.
        steps, epochs: length, one of the two; ``steps`` goes over the data as often as it takes.
        lr: of AdamW, fixed in stage 1, falling to 0 with power 0.9 in stage 2. None: the paper's, 1e-2 for batches of
            256 and 1e-3 for batches of 128, times ``sqrt(batch / those)``, batch being the first one of all processes
            together (the square root is what keeps Adam's noise: Malladi et al., NeurIPS 2022); but at most
            ``loss / sum |gradient|`` of that batch. AdamW's first step moves every parameter by the rate, and with a
            greater one it would go past a loss of 0 on the tangent (Polyak's step length, 1987, for steps by sign).
            This spares students that begin near their teacher: the paper's rate would drive them away.
        weight_decay: of AdamW.
        loss_scale: of stage 2: 5 for DINOv2, 4000 for CLIP, 1 for SigLIP and supervised ViTs.
        bf16: run both under bfloat16 autocast; losses stay float32.
        log_interval: steps between progress lines; there is one with each checkpoint, too.
        validate: called in every process with the model in eval mode, without gradients; what it returns
            on rank 0 is logged.
        val_interval: steps between its calls; None: after the last step only. It is called after that in any case.
        checkpoint: file that holds all that `resume` needs, replaced every ``checkpoint_interval`` steps and at the
            end. Rank 0 writes it, and reads it for all.
        resume: go on from ``checkpoint``, if it is there, as if nothing had happened; else start. The data are read
            again up to where the run was, and have to come in an order drawn from PyTorch's generator, or always the
            same.

    Returns:
        One dict per progress line: ``step``, and means since the last one of ``loss`` and ``rel_error``, which is
        ``||student - teacher|| / ||teacher||``, in stage 1 its mean over blocks; and one per validation: ``step`` and
        what it returned.

    Raises:
        ValueError: for another stage, a rate where nothing learns by steps or that is not above 0, not exactly one of
            ``steps`` and ``epochs``, lengths or intervals that are no whole numbers above 0, a dataloader without
            batches or with none left, a model without linear blocks, or one that does not fit its teacher; for a
            checkpoint of another run; for processes that would all see the same images.
        FileExistsError: for a checkpoint that is there, without ``resume``.
        TypeError: for unsupported models, batches of another kind, or ``epochs`` of a dataloader without length.
        FloatingPointError: if the loss is no longer finite.
    """
    if stage == 'calibrate':
        if lr is not None:
            raise ValueError(f"lr={lr}: stage='calibrate' takes no gradient steps. Its own options are those of "
                             'adala_mm.calibrate')
        return calibrate(model, teacher, dataloader, steps, epochs, bf16=bf16, validate=validate,
                         val_interval=val_interval, checkpoint=checkpoint, resume=resume)
    if stage not in LEARNING_RATES:
        raise ValueError(f"stage={stage!r}: there are stages 1, 2 and 'calibrate'")
    require_whole(log_interval=log_interval, val_interval=val_interval, checkpoint_interval=checkpoint_interval)
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f'lr={lr} has to be above 0 and finite')
    total, data = steps_in(dataloader, steps, epochs), Batches(dataloader)
    pairs, learners, measure = _prepare(model, teacher, stage)
    device, dtype = (getattr(learners[0], fact) for fact in ('device', 'dtype'))
    run = dict(stage=stage, total=total, lr=lr, weight_decay=weight_decay, loss_scale=loss_scale, bf16=bf16,
               processes=get_world_size())
    saved = read_run(checkpoint, run, resume)
    begun, history = (saved['step'], saved['history']) if saved else (0, [])
    since, start, seen, factor = [], time.perf_counter(), 0, 1.0 if stage == 1 else loss_scale

    with frozen(teacher), _learning(model, learners, pairs, stage):
        for value in model.state_dict(keep_vars=True).values():
            broadcast(value.detach())
        optimizer = torch.optim.AdamW(learners, LEARNING_RATES[stage], weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 if stage == 1 else (1 - step / total) ** 0.9)
        parts = {'model': model, 'optimizer': optimizer, 'schedule': schedule}
        if saved:
            restore_run(saved, parts)
            data.seek(saved['data'])
            report(f'stage {stage}  {checkpoint}: goes on after step {begun}/{total}')
        for step, images in zip(range(begun + 1, total + 1), data, strict=False):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                since.append(measure(images.to(device, dtype, non_blocking=True), factor))
            gradients = [parameter.grad for parameter in learners if parameter.grad is not None]
            all_reduce_params(gradients, op='mean')
            if step == 1:
                _set_rate(schedule, stage, lr, len(images), since[0][0], gradients)
            optimizer.step()
            schedule.step()
            seen += len(images) * get_world_size()
            keep = checkpoint and (step % checkpoint_interval == 0 or step == total)
            if step % log_interval == 0 or step == total or keep:  # nothing that is not finite replaces a checkpoint
                all_reduce(figures := torch.stack(since).mean(dim=0), op='mean')
                loss, error = figures.tolist()
                if not math.isfinite(loss):
                    raise FloatingPointError(f'stage {stage}: the loss is {loss} after step {step}; try a lower lr')
                history.append({'step': step, 'loss': loss, 'rel_error': error})
                since, speed = [], seen / (time.perf_counter() - start)
                eta = time.strftime('%H:%M:%S', time.gmtime(seen / (step - begun) * (total - step) / speed))
                report(f'stage {stage}  step {step}/{total}  loss {loss:.4g}  rel_error {error:.4f}  '
                       f'{speed:.1f} images/s  ETA {eta}')
            if validate and (step == total or (val_interval and step % val_interval == 0)):
                history.append({'step': step, **validated(validate, model)})
                report('  '.join([f'stage {stage}', *(f'{name} {value}' for name, value in history[-1].items())]))
            if keep:
                write_run(checkpoint, run, parts, {'data': data.state(), 'step': step, 'history': history})
    return history


def _set_rate(schedule: torch.optim.lr_scheduler.LRScheduler, stage: int, lr: float | None, images: int, loss: Tensor,
              gradients: list[Tensor]) -> None:
    """The learning rate of the first step, and with it of all others, from what this process found at the first one."""
    why = ''
    if lr is None:
        all_reduce(batch := torch.tensor(images))
        all_reduce(loss := loss.clone(), op='mean')
        reference = BATCHES[stage]
        lr = LEARNING_RATES[stage] * (int(batch) / reference) ** 0.5
        why = f': {LEARNING_RATES[stage]:g} for batches of {reference}, times sqrt({int(batch)} / {reference})'
        slope = float(sum(gradient.abs().sum(dtype=torch.float32) for gradient in gradients))
        limit = float(loss) / slope if slope else 0.0  # nothing is left to learn
        if limit < lr:
            lr, why = limit, f': more would go past a loss of 0. The paper has {lr:.4g}{why}'
    schedule.base_lrs = [lr]
    schedule.optimizer.param_groups[0]['lr'] = lr
    report(f'stage {stage}  lr {lr:.4g}{why}')


Pair = tuple[nn.Module, nn.Module]  # attentions of student and teacher


def _prepare(model: nn.Module, teacher: nn.Module,
             stage: int) -> tuple[list[Pair], list[nn.Parameter], Callable[[Tensor, float], Tensor]]:
    """Replaced attentions beside the teacher's, what learns, and what differentiates the loss of a batch."""
    vit, old, architecture = find_pair(model, teacher)
    both = zip(architecture.attentions_of(vit), architecture.attentions_of(old), strict=True)
    pairs = [(a, b) for a, b in both if is_linear(a)]
    if stage == 2:
        return pairs, list(model.parameters()), lambda images, factor: _feature_loss(
            architecture.features, vit, old, images, factor)
    learners = [parameter for new, softmax in pairs for name, parameter in new.named_parameters()
                if QKV.match(name) or name not in dict(softmax.named_parameters())]
    return pairs, learners, lambda images, factor: _attention_loss(architecture, old, pairs, images)


def _attention_loss(architecture: Architecture, teacher: nn.Module, pairs: list[Pair], images: Tensor) -> Tensor:
    """(loss, relative error) of stage 1. Each block is differentiated as soon as the teacher has passed it."""
    def compare(student: nn.Module, got: Tensor | tuple, wanted: Tensor | tuple) -> Tensor:
        got, wanted = first_of(got), first_of(wanted)
        loss = mean_squared_error(got, wanted)
        _backward(loss / len(pairs))
        return torch.stack([loss.detach(), relative_error(got, wanted)])

    with torch.enable_grad(), ExitStack() as hooks, compared(pairs, compare) as measured, torch.no_grad():
        if isinstance(pairs[0][0], Adapter):  # the student's own patch embedding does not run
            patches = teacher.get_submodule(architecture.patches)
            hooks.callback(patches.register_forward_hook(pairs[0][0].layout).remove)
        architecture.features(teacher, images)
    return torch.stack(measured).mean(dim=0)


def _feature_loss(features: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, teacher: nn.Module,
                  images: Tensor, factor: float) -> Tensor:
    """(loss, relative error) of stage 2."""
    with torch.no_grad():
        wanted = features(teacher, images)
    got = features(model, images)
    if got.shape != wanted.shape:
        raise ValueError(f'the features of the model are {tuple(got.shape)}, those of its teacher '
                         f'{tuple(wanted.shape)}: linearize this teacher')
    loss = factor * mean_squared_error(got, wanted)
    _backward(loss)
    return torch.stack([loss.detach(), relative_error(got, wanted)])


def _backward(loss: Tensor) -> None:
    """Adds gradients outside of autocast, as PyTorch recommends."""
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()


@contextmanager
def _learning(model: nn.Module, learners: list[nn.Parameter], pairs: list[Pair], stage: int) -> Iterator[None]:
    """Stage 1 trains attentions alone, without the model's own dropouts in them: the teacher has none.

    In neither stage rotary positions move, as those of DINOv3 may in training: the teacher's do not.
    """
    vit, architecture = find_vit(model)
    with restored(model):
        model.requires_grad_(False)
        model.train(stage == 2)
        if (positions := architecture.rotary(vit)) is not None:
            positions.eval()
        for parameter in learners:
            parameter.requires_grad_(True)
        for new, softmax in pairs if stage == 1 else ():
            new.train()
            for name, _ in softmax.named_children():
                if name in new._modules:
                    new._modules[name].eval()
        try:
            yield
        finally:
            model.zero_grad()
