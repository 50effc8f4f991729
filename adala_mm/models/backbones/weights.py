"""Loads a checkpoint into `AdaLAViT`: every key is used, dropped by a named rule, or an error."""
from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mmengine.logging import print_log
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.parts import GridTable
from adala_mm.utils.checkpoint import read_state_dict
from adala_mm.utils.fingerprint import fingerprint

if TYPE_CHECKING:
    from adala_mm.models.backbones.vit import AdaLAViT

LINES = 24  # of a table of keys
# What a timm or mmpretrain ViT has behind its last block and a backbone has not.
HEAD_KEYS = re.compile(r'(head|head_dist|fc_norm|attn_pool)\.')


def read_backbone(init_cfg: dict) -> tuple[str, dict[str, Tensor], bool]:
    """What ``init_cfg`` names: path, state dict of the backbone, and whether its keys stood under the prefix.

    Raises:
        FileNotFoundError, ValueError: for a missing or unreadable file, and for any other ``init_cfg``.
    """
    options = dict(init_cfg)
    kind, path = options.pop('type', None), options.pop('checkpoint', None)
    prefix = options.pop('prefix', 'backbone.')
    if kind != 'Pretrained' or not path or options:
        raise ValueError("init_cfg must be dict(type='Pretrained', checkpoint=<file or timm://name>, "
                         f'prefix=<optional>), got {init_cfg}')
    state = read_state_dict(path)
    own = any(key.startswith(prefix) for key in state)
    if own:
        state = {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}
    return path, state, own


def load_vit(model: AdaLAViT, init_cfg: dict) -> None:
    """Loads ``init_cfg['checkpoint']`` into ``model``.

    Keys under ``prefix`` (default ``backbone.``) are taken if there are any, else the whole file is read as a timm
    state dict without its head and pooling keys. The patch kernel is resampled to the model's patch size (FlexiViT's
    pseudo-inverse, as in timm), position embeddings to its grid (bicubic, antialiased), and so are the tables over the
    grid that some attentions have. Parameters that only this
    attention variant has may be missing; nothing else may, and nothing may be left over.

    Raises:
        FileNotFoundError, ValueError: for a missing or unreadable file.
        ValueError: for any other ``init_cfg`` type, for missing, unexpected or mis-shaped keys, and for the weights of
            a linearized model with another attention.
    """
    path, state, own = read_backbone(init_cfg)
    dropped = [key for key in state if HEAD_KEYS.match(key)]
    state = {key: value for key, value in state.items() if key not in dropped}
    problems = [layer.take_mark(state, f'{name}.') for name, layer in model.named_modules()
                if isinstance(layer, Attention)]
    if problem := next(filter(None, problems), None):
        raise ValueError(f'{path} is of a linearized model: {problem}')
    notes = _resample(model, state, own)

    wanted = model.state_dict()
    if table := misfits({key: tuple(value.shape) for key, value in state.items()},
                        {key: tuple(value.shape) for key, value in wanted.items()}):
        raise ValueError(f'{path} does not fit this ViT:\n{table}\nIs it the model family that the config describes '
                         '(width, depth, class token, registers, LayerScale)?')
    model.load_state_dict(state, strict=False)
    note_loaded(model, state)
    new = [key for key in wanted if key not in state]
    print_log(f'AdaLAViT: {len(state)} tensors from {path}'
              + (f'; dropped {", ".join(dropped)}' if dropped else '')
              + (f'; {"; ".join(notes)}' if notes else '')
              + (f'; new in this variant: {len(new)} tensors' if new else '')
              + f'; fingerprint {model.loaded[1]}', logger='current')


def misfits(found: dict[str, tuple], wanted: dict[str, tuple]) -> str:
    """A table of missing, unexpected and mis-shaped keys, alike ones of all blocks in one line; empty if all fit.

    Args:
        found, wanted: shapes by key, in the file and in the model. Keys that only an attention variant has may miss.
    """
    rows: dict[tuple, list[str]] = {}
    for key in [*wanted, *(key for key in found if key not in wanted)]:
        if found.get(key) == wanted.get(key) or (key not in found and is_extra(key)):
            continue
        problem = 'missing' if key not in found else 'unexpected' if key not in wanted else 'other shape'
        name = re.sub(r'\bblocks\.\d+\.', 'blocks.*.', key)
        rows.setdefault((problem, name, found.get(key, '-'), wanted.get(key, '-')), []).append(key)
    if not rows:
        return ''
    lines = [('', 'key', 'in the file', 'in the model')]
    lines += [(problem, f'{name}  (x {len(keys)})' if len(keys) > 1 else keys[0], str(here), str(there))
              for (problem, name, here, there), keys in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    shown = ['  ' + '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
             for line in lines[:LINES + 1]]
    return '\n'.join(shown + [f'  ... and {len(rows) - LINES} more'] * (len(rows) > LINES))


def note_loaded(model: nn.Module, keys: Iterable[str]) -> None:
    """Puts keys and fingerprint of loaded tensors down in ``model.loaded``, for `WeightsCheckHook`."""
    state = model.state_dict()
    model.loaded = tuple(keys), fingerprint({key: state[key] for key in keys})


def is_extra(key: str) -> bool:
    """Whether a parameter or module is one that a variant adds to the plain attention."""
    return re.match(r'blocks\.\d+\.attn\.(?!(qkv|proj)(\.|$))', key) is not None


def _resample(model: AdaLAViT, state: dict[str, Tensor], own: bool) -> list[str]:
    """Fits patch kernel, position embeddings and attentions' tables to the model, in place; says what was done.

    A file does not record its position grid. A square number of positions is read as a square grid, except in a file
    of our own (``own``) with as many as the model has: those lie on the model's grid, square or not.
    """
    notes = []
    size, grid = model.patch_size, model.pos_grid
    kernel = state.get('patch_embed.proj.weight')
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-1] != size:
        state['patch_embed.proj.weight'] = resample_patch_embed(kernel, [size, size])
        notes.append(f'patch kernel {kernel.shape[-1]} -> {size}')
    tables = 0
    for name, table in model.named_modules():
        stored = state.get(f'{name}.weight') if isinstance(table, GridTable) else None
        if stored is not None and stored.ndim == 3 and stored.shape[1:] != table.weight.shape[1:]:
            state[f'{name}.weight'] = table.fit(stored, table.weight.shape[1:])
            tables += 1
    if tables:
        notes.append(f'{tables} tables over the grid -> {grid[0]}x{grid[1]}')
    position = state.get('pos_embed')
    prefix = 0 if model.no_embed_class else model.num_prefix
    if position is None:
        return notes
    patches = position.shape[1] - prefix
    side = round(max(patches, 0) ** 0.5)
    if position.shape[1] == model.pos_embed.shape[1] and (own or side * side != patches):
        return notes
    if side * side != patches or side == 0:
        raise ValueError(f'pos_embed of the checkpoint has {position.shape[1]} entries: not a square grid plus '
                         f'{prefix} class and register tokens, so it cannot be resized. Check class_token, '
                         'num_registers and no_embed_class')
    if (side, side) != grid:
        state['pos_embed'] = resample_abs_pos_embed(position, list(grid), old_size=[side, side],
                                                    num_prefix_tokens=prefix)
        notes.append(f'positions {side}x{side} -> {grid[0]}x{grid[1]}')
    return notes
