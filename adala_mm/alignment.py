"""`align`: stages 1 and 2 of ViT-AdaLA as a plain PyTorch loop, for a model from `linearize`."""
from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.adapters import Adapter, Family, find_vit
from adala_mm.linearization import is_linear, say

LEARNING_RATES = {1: 1e-2, 2: 1e-3}  # ViT-AdaLA Table 5: the first fixed, the second falling polynomially
QKV = re.compile(r'(qkv|[qkv]_proj|[qkv]_bias|attention\.(query|key|value))(\.|$)')


def align(model: nn.Module, teacher: nn.Module, dataloader: Iterable[Any], stage: int = 1, steps: int | None = None,
          epochs: int | None = None, lr: float | None = None, weight_decay: float = 0.05, loss_scale: float = 1.0,
          bf16: bool = False, log_interval: int = 50) -> list[dict[str, float]]:
    """Brings a linearized ViT back to its softmax original; run stage 1, then stage 2.

    Stage 1: ``loss = mean over replaced blocks of mean (attn_l(h_l) - teacher_l(h_l))^2``, h_l being what the block's
    attention reads in the *teacher*. Queries', keys' and values' projections learn, and what the new attention adds.
    One block is in memory at a time. Stage 2: ``loss = loss_scale * mean (features - teacher's)^2`` on the final
    normalised tokens; everything learns. Same losses as `AttentionAlignment` and `FeatureAlignment`, on one device,
    without their hooks (Performer's features are not redrawn). mmpretrain's attentions end after LayerScale, so stage 1
    compares there.

    Args:
        model: from `linearize`; trained in place, on its device and in its dtype.
        teacher: the original, of the same family, on the same device. Frozen and in eval mode meanwhile.
        dataloader: yields images (B, 3, H, W), normalised as the ViT inside expects them: a tensor, a tuple or list
            that begins with one, or a dict with ``pixel_values``.
        stage: 1 or 2.
        steps, epochs: length, one of the two; ``steps`` goes over the data as often as it takes.
        lr: of AdamW; 1e-2 in stage 1 and 1e-3, falling to 0 with power 0.9, in stage 2, for batches of 256 and 128.
        weight_decay: of AdamW.
        loss_scale: of stage 2: 5 for DINOv2, 4000 for CLIP, 1 for SigLIP and supervised ViTs.
        bf16: run both under bfloat16 autocast; losses stay float32.
        log_interval: steps between progress lines.

    Returns:
        One dict per progress line: ``step``, and means since the last one of ``loss`` and ``rel_error``, which is
        ``||student - teacher|| / ||teacher||``, in stage 1 its mean over blocks.

    Raises:
        ValueError: for a stage other than 1 and 2, not exactly one of ``steps`` and ``epochs``, nothing to do, a model
            without linear blocks, or one that does not fit its teacher.
        TypeError: for unsupported models, batches of another kind, or ``epochs`` of a dataloader without length.
        FloatingPointError: if the loss is no longer finite.
    """
    if stage not in LEARNING_RATES:
        raise ValueError(f'stage={stage!r}: there are stages 1 and 2')
    if (steps is None) == (epochs is None):
        raise ValueError('tell either steps or epochs')
    total = epochs * len(dataloader) if steps is None else steps
    if total < 1:
        raise ValueError(f'steps={steps} and epochs={epochs} of this dataloader come to nothing')
    pairs, learners, measure = _prepare(model, teacher, stage)
    device, dtype = (getattr(learners[0], fact) for fact in ('device', 'dtype'))
    if device != (place := next(teacher.parameters()).device):
        raise ValueError(f'the model is on {device}, its teacher on {place}')
    factor = 1.0 if stage == 1 else loss_scale

    history, since, seen, start = [], [], 0, time.perf_counter()
    with _frozen(teacher), _learning(model, learners, pairs, stage):
        optimizer = torch.optim.AdamW(learners, LEARNING_RATES[stage] if lr is None else lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 if stage == 1 else (1 - step / total) ** 0.9)
        for step, images in enumerate(_images(dataloader, total), start=1):
            images = images.to(device, dtype, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                since.append(measure(images, factor))
            optimizer.step()
            schedule.step()
            seen += len(images)
            if step % log_interval and step != total:
                continue
            loss, error = torch.stack(since).mean(dim=0).tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(f'stage {stage}: the loss is {loss} after step {step}; try a lower lr')
            history.append({'step': step, 'loss': loss, 'rel_error': error})
            elapsed = time.perf_counter() - start
            eta = time.strftime('%H:%M:%S', time.gmtime(elapsed / step * (total - step)))
            say(f'stage {stage}  step {step}/{total}  loss {loss:.4g}  rel_error {error:.4f}  '
                f'{seen / elapsed:.1f} images/s  ETA {eta}')
            since = []
    return history


Pair = tuple[nn.Module, nn.Module]  # attentions of student and teacher


def _prepare(model: nn.Module, teacher: nn.Module,
             stage: int) -> tuple[list[Pair], list[nn.Parameter], Callable[[Tensor, float], Tensor]]:
    """Replaced attentions beside the teacher's, what learns, and what differentiates the loss of a batch."""
    (vit, family), (old, old_family) = find_vit(model), find_vit(teacher)
    attentions, old_attentions = family.attentions_of(vit), old_family.attentions_of(old)
    if family is not old_family or len(attentions) != len(old_attentions):
        raise ValueError(f'the model ({family.name}, {len(attentions)} blocks) and its teacher ({old_family.name}, '
                         f'{len(old_attentions)} blocks) are not the same network')
    if {id(p) for p in model.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError('the model and its teacher share weights: let linearize make a copy (inplace=False)')
    pairs = [(a, b) for a, b in zip(attentions, old_attentions, strict=True) if is_linear(a)]
    if not pairs:
        raise ValueError(f'{type(vit).__name__} has no linear block: call linearize first')
    if stage == 2:
        return pairs, list(model.parameters()), lambda images, factor: _feature_loss(
            family.features, vit, old, images, factor)
    learners = [parameter for new, softmax in pairs for name, parameter in new.named_parameters()
                if QKV.match(name) or name not in dict(softmax.named_parameters())]
    return pairs, learners, lambda images, factor: _attention_loss(family, old, pairs, images)


def _attention_loss(family: Family, teacher: nn.Module, pairs: list[Pair], images: Tensor) -> Tensor:
    """(loss, relative error) of stage 1. Each block is differentiated as soon as the teacher has passed it."""
    measured = []

    def compare(student: nn.Module, softmax: nn.Module, args: tuple, kwargs: dict, output) -> None:
        with torch.enable_grad():
            loss, error = _distance(_first(student(*args, **kwargs)), _first(output))
            share = loss / len(pairs)
        with torch.autocast(images.device.type, enabled=False):
            share.backward()
        measured.append(torch.stack([loss.detach(), error]))

    with ExitStack() as hooks, torch.no_grad():
        if isinstance(pairs[0][0], Adapter):  # the student's own patch embedding does not run
            patches = teacher.get_submodule(family.patches)
            hooks.callback(patches.register_forward_hook(pairs[0][0].layout).remove)
        for student, softmax in pairs:
            def hook(module, args, kwargs, output, student=student):
                compare(student, module, args, kwargs, output)
            hooks.callback(softmax.register_forward_hook(hook, with_kwargs=True).remove)
        family.features(teacher, images)
    return torch.stack(measured).mean(dim=0)


def _feature_loss(features: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, teacher: nn.Module,
                  images: Tensor, factor: float) -> Tensor:
    """(loss, relative error) of stage 2."""
    with torch.no_grad():
        wanted = features(teacher, images)
    got = features(model, images)
    if got.shape != wanted.shape:
        raise ValueError(f'the features of the model are {tuple(got.shape)}, those of its teacher '
                         f'{tuple(wanted.shape)}')
    loss, error = _distance(got, wanted)
    loss = factor * loss
    with torch.autocast(images.device.type, enabled=False):
        loss.backward()
    return torch.stack([loss.detach(), error])


def _distance(got: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared and relative error, in float32."""
    wide = torch.promote_types(wanted.dtype, torch.float32)
    got, wanted = got.to(wide), wanted.to(wide)
    return F.mse_loss(got, wanted), (got.detach() - wanted).norm() / wanted.norm().clamp_min(1e-12)


def _first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _images(dataloader: Iterable[Any], total: int) -> Iterator[Tensor]:
    """The images of ``total`` batches."""
    done = 0
    while done < total:
        before = done
        for batch in dataloader:
            if isinstance(batch, Mapping) and 'pixel_values' in batch:
                batch = batch['pixel_values']
            elif isinstance(batch, (tuple, list)) and batch:
                batch = batch[0]
            if not isinstance(batch, Tensor) or batch.ndim != 4:
                kind = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
                raise TypeError(f'the dataloader yields {kind}, not images (B, 3, H, W), (images, ...) or '
                                "{'pixel_values': images}")
            yield batch
            done += 1
            if done == total:
                return
        if done == before:
            raise ValueError('the dataloader is empty')


@contextmanager
def _restored(*models: nn.Module) -> Iterator[None]:
    """Puts modes and gradient flags back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _frozen(teacher: nn.Module) -> Iterator[None]:
    with _restored(teacher):
        teacher.eval()  # not in a chain: mmpretrain's returns None
        teacher.requires_grad_(False)
        yield


@contextmanager
def _learning(model: nn.Module, learners: list[nn.Parameter], pairs: list[Pair], stage: int) -> Iterator[None]:
    """Stage 1 trains attentions alone, without the model's own dropouts in them: the teacher has none."""
    with _restored(model):
        model.requires_grad_(False)
        model.train(stage == 2)
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
