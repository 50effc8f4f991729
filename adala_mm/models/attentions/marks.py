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


def add_mark(state: dict[str, Any], prefix: str, kind: dict[str, Any], reshaped: str | None) -> None:
    """Marks the layer at ``prefix``, in place; ``reshaped`` is the parameter that gets one dimension more."""
    state[f'{prefix}{MARK}'] = encode(kind)
    if reshaped is not None:
        state[f'{prefix}{reshaped}'] = state[f'{prefix}{reshaped}'].unsqueeze(0)


def take_mark(state: dict[str, Any], prefix: str, reshaped: str | None) -> dict[str, Any] | None:
    """Takes off, in place, what `add_mark` adds at ``prefix``, and returns what the mark says; None without one."""
    mark, name = state.pop(f'{prefix}{MARK}', None), f'{prefix}{reshaped}'
    value = None if reshaped is None else state.get(name)
    if value is not None and value.ndim == (2 if name.endswith('bias') else 3) and value.shape[0] == 1:
        state[name] = value.squeeze(0)
    return None if mark is None else decode(mark)


def last_of(output: nn.Module, layer: nn.Module) -> str | None:
    """Name in ``layer`` of its output projection's bias, or else weight; None if quantized or wrapped in adapters.

    What adapters such as LoRA put inside it is never meant: those save and load their own parameters alone.
    """
    path = next(name for name, module in layer.named_modules() if module is output)
    own = (name for name in ('bias', 'weight') if output._parameters.get(name) is not None)
    return next((f'{path}.{name}' for name in own), None)


def describe(kind: dict[str, Any]) -> str:
    options = ', '.join(f'{name}={value!r}' for name, value in kind.items() if name != 'type')
    return f'{re.sub(r"^adala_mm[.]", "", kind["type"])}({options})'
