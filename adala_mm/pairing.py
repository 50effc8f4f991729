"""What `align` and `calibrate` share: a student beside its frozen teacher, the length of a run, and reports."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from mmengine.dist import is_main_process
from torch import Tensor, nn

from adala_mm.adapters import Architecture, find_vit
from adala_mm.linearization import is_linear, say
from adala_mm.utils.batches import common_length


def find_pair(model: nn.Module, teacher: nn.Module) -> tuple[nn.Module, nn.Module, Architecture]:
    """The ViTs in a linearized model and in its teacher, and their architecture.

    Raises:
        ValueError: if they are not the same network, share weights or are on two devices, or no block is linear.
        TypeError: for unsupported models.
    """
    (vit, architecture), (old, old_architecture) = find_vit(model), find_vit(teacher)
    attentions, old_attentions = architecture.attentions_of(vit), old_architecture.attentions_of(old)
    if architecture is not old_architecture or len(attentions) != len(old_attentions):
        raise ValueError(f'the model ({architecture.name}, {len(attentions)} blocks) and its teacher '
                         f'({old_architecture.name}, {len(old_attentions)} blocks) are not the same network: '
                         'linearize this teacher')
    if {id(p) for p in model.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError('the model and its teacher share weights: let linearize make a copy (inplace=False)')
    if not any(map(is_linear, attentions)):
        raise ValueError(f'{type(vit).__name__} has no linear block: call linearize first')
    place, other = (next(net.parameters()).device for net in (vit, old))
    if place != other:
        raise ValueError(f'the model is on {place}, its teacher on {other}: move both to one device')
    return vit, old, architecture


def steps_in(dataloader: Iterable[Any], steps: int | None, epochs: int | None) -> int:
    """Length of a run in batches, the same in all processes.

    Raises:
        ValueError: for not exactly one of ``steps`` and ``epochs``, no whole number, or nothing to do.
        TypeError: for ``epochs`` of a dataloader without length.
    """
    if (steps is None) == (epochs is None):
        raise ValueError('give either steps or epochs, and not both')
    require_whole(steps=steps, epochs=epochs)
    if steps is not None:
        return steps
    try:
        length = len(dataloader)
    except TypeError as error:  # streams have none
        raise TypeError(f'epochs={epochs} of a {type(dataloader).__name__} without length: say steps') from error
    if (total := common_length(epochs * length)) < 1:
        raise ValueError(f'epochs={epochs} of this dataloader are no steps: it has no batch. Are there fewer '
                         'images than a batch, with drop_last?')
    return total


def require_whole(**numbers: int | None) -> None:
    """Raises a ValueError for a number that is there, and is no whole one above 0."""
    for name, number in numbers.items():
        if number is not None and not (isinstance(number, Integral) and number > 0):
            raise ValueError(f'{name}={number!r} has to be a whole number of at least 1')


def report(message: str) -> None:
    """Prints a message from the first process only."""
    if is_main_process():
        say(message)


@contextmanager
def restored(*models: nn.Module) -> Iterator[None]:
    """Restores training modes and gradient flags at the end."""
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
def frozen(*models: nn.Module) -> Iterator[None]:
    """Keeps the models in evaluation mode and without gradients while it is open."""
    with restored(*models):
        for model in models:
            model.eval()  # not in a chain: mmpretrain's returns None
            model.requires_grad_(False)
        yield


@torch.no_grad()
def validated(validate: Callable[[nn.Module], Mapping[str, float] | None], model: nn.Module) -> dict[str, float]:
    """The scores that ``validate`` returns for the model in evaluation mode."""
    with restored(model):
        model.eval()
        return dict(validate(model) or {})


def first_of(output: Tensor | tuple) -> Tensor:
    """The output of a module, or the first one if it returns several."""
    return output[0] if isinstance(output, tuple) else output
