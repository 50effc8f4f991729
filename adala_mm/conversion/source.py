"""`Source` describes how a library names the weights of a ViT; `Converted` holds these weights under our names."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import Tensor

from adala_mm.conversion.families import FAMILIES, Family


@dataclass(frozen=True)
class Source:
    """One naming of a ViT's weights.

    In templates of keys ``#`` is the number of a block, ``@`` a number without meaning, ``*`` is ``weight`` or
    ``bias``, and a final ``**`` is anything.

    Args:
        name: as it is reported.
        prefixes: what the backbone's keys may stand under.
        mark: whether a set of keys, without the prefix, is of this source.
        rename: template of a key to the template of ours. ``attn.q``, ``attn.k`` and ``attn.v`` are joined later.
        families: those that exist in this naming.
        reference: ``(converted, state, name)`` to the source library's model with the weights of ``state`` at native
            size: what it is, and a function from images (B, 3, H, W) to final tokens (B, N, C).
        any_size: families whose positions the library fits to other sizes as `AdaLAViT` does.
        norm_eps: with which epsilon the library runs the weights, if not the one of their family.
        key_bias: whether keys have a bias if queries have one; else ours is zero there, whatever the file has.
        drop: template of a key under the prefix to the reason why a backbone has no use for it.
        outside: the same for keys that do not stand under the prefix.
    """

    name: str
    prefixes: tuple[str, ...]
    mark: Callable[[set[str]], bool]
    rename: dict[str, str]
    families: tuple[str, ...]
    reference: Callable[[Converted, dict[str, Tensor], str | None], tuple[str, Callable[[Tensor], Tensor]]]
    any_size: tuple[str, ...] = ()
    norm_eps: float | None = None
    key_bias: bool = True
    drop: dict[str, str] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)

    def our_key(self, key: str) -> str | None:
        """What a key, without prefix, is in `AdaLAViT`; None if no template fits."""
        return next((done for ours in self.rename.items() if (done := translate(key, *ours)) is not None), None)

    def own_key(self, ours: str) -> str:
        """The reverse, for messages: how this source names a key of ours."""
        names = [done for theirs, our in self.rename.items() if (done := translate(ours, our, theirs)) is not None]
        if not names and (joined := re.fullmatch(r'(blocks\.\d+\.attn)\.qkv\.(weight|bias)', ours)):
            return self.own_key(f'{joined[1]}.q.{joined[2]}')
        return names[0] if names else ours


@dataclass(frozen=True)
class Converted:
    """Weights under the keys of `AdaLAViT`, and what is known about them.

    Args:
        state: tensors in float32.
        source, prefix: the source that the weights are from, and the prefix of their keys in the file.
        family_name: key of `FAMILIES`.
        licence: licence of the weights, with the name of who states it if that is not `FAMILIES`.
        config: arguments of `AdaLAViT`, without ``attention`` and ``init_cfg``.
        grid: (h, w) of the position embeddings.
        report: one entry for each step of the conversion: (step, number of tensors, details).
    """

    state: dict[str, Tensor]
    source: Source
    prefix: str
    family_name: str
    licence: str
    config: dict[str, Any]
    grid: tuple[int, int]
    report: tuple[tuple[str, int, str], ...]

    @property
    def family(self) -> Family:
        row = FAMILIES[self.family_name]
        return replace(row, norm_eps=self.config.get('norm_eps', row.norm_eps))


@cache
def pattern(template: str) -> re.Pattern:
    """Regular expression of a template."""
    text = re.escape(template)
    for mark, group in (('@', r'\d+'), (r'\*\*', '.*'), (r'\#', r'(?P<block>\d+)'), (r'\*', '(?P<kind>weight|bias)')):
        text = text.replace(mark, group, 1)
    return re.compile(text)


def translate(key: str, template: str, target: str) -> str | None:
    """``key`` of ``template`` as one of ``target``, or None if it is none of ``template``."""
    found = pattern(template).fullmatch(key)
    if found is None:
        return None
    for mark, group in (('#', 'block'), ('*', 'kind')):
        if group in found.groupdict():
            target = target.replace(mark, found[group])
    return target


def reason_to_drop(key: str, rules: dict[str, str]) -> str | None:
    """The reason of the first rule that fits, or None."""
    return next((reason for template, reason in rules.items() if pattern(template).fullmatch(key)), None)
