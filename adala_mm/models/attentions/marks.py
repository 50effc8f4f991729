"""What the state dict of a linearized model says of its attentions, so that nobody takes them for softmax.

Beside the weights of such a layer stands its ``adala_mm``: type and options as JSON in bytes. It is a key that no other
model has, which a strict load reports. Loads that are not strict, such as transformers' ``from_pretrained`` and timm's
with another ``num_classes``, fail at the output projection, whose last parameter has one dimension more, of length 1.
Layers of ours take both off again; without them they load what any softmax model has.
"""
from __future__ import annotations

import inspect
import json
import re
from typing import Any

import torch
from torch import Tensor, nn

from adala_mm.registry import ATTENTIONS

MARK = 'adala_mm'
BUILT = ('self', 'dim', 'num_heads', 'qkv_bias', 'grid', 'num_prefix')  # what the ViT says, not the options


def options_of(layer: type[nn.Module], options: dict[str, Any]) -> dict[str, Any]:
    """``dict(type=..., <all options, defaults included>)``, as JSON gives it back.

    Raises:
        TypeError: for options that are no plain values.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(layer).parameters.items()
                if parameter.default is not parameter.empty and name not in BUILT}
    registered = ATTENTIONS.module_dict.get(layer.__name__) is layer
    name = f'adala_mm.{layer.__name__}' if registered else f'{layer.__module__}.{layer.__qualname__}'
    try:
        return json.loads(json.dumps({'type': name} | defaults | options))
    except TypeError as error:
        raise TypeError(f'options of {layer.__name__} are to be saved, so they must be numbers, strings, lists or '
                        f'dicts of them ({error}): make anything else part of a subclass') from error


def encode(kind: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(kind).encode()), dtype=torch.uint8)


def decode(mark: Tensor) -> dict[str, Any]:
    """The inverse of `encode`.

    Raises:
        ValueError: if this is no mark.
    """
    try:
        kind = json.loads(bytes(mark.tolist()))
        return {'type': str(kind['type']), **kind}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'a key {MARK!r} holds no attention of ours: the file is damaged') from error


def add_mark(state: dict[str, Any], prefix: str, kind: dict[str, Any], reshaped: str) -> None:
    """Marks the layer at ``prefix``, in place; ``reshaped`` is the parameter that gets one dimension more."""
    state[f'{prefix}{MARK}'] = encode(kind)
    state[f'{prefix}{reshaped}'] = state[f'{prefix}{reshaped}'].unsqueeze(0)


def take_mark(state: dict[str, Any], prefix: str, reshaped: str) -> dict[str, Any] | None:
    """Takes the mark of the layer at ``prefix`` off, in place, and returns what it says; None if there is none."""
    mark = state.pop(f'{prefix}{MARK}', None)
    if mark is None:
        return None
    value = state.get(f'{prefix}{reshaped}')
    if value is not None and value.shape[:1] == (1,):
        state[f'{prefix}{reshaped}'] = value.squeeze(0)
    return decode(mark)


def last_of(output: nn.Module, layer: nn.Module) -> str:
    """Name in ``layer`` of the last parameter of its output projection."""
    last = list(output.parameters())[-1]
    return next(name for name, parameter in layer.named_parameters() if parameter is last)


def describe(kind: dict[str, Any]) -> str:
    options = ', '.join(f'{name}={value!r}' for name, value in kind.items() if name != 'type')
    return f'{re.sub(r"^adala_mm[.]", "", kind["type"])}({options})'
