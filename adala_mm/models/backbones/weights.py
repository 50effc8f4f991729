"""Loads a checkpoint into `AdaLAViT`: a key is used, or a named rule drops it, or it raises an error."""
from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.parts import GridTable
from adala_mm.utils.checkpoint import TIMM, read_state_dict, recorded_grid, recorded_linear, under
from adala_mm.utils.fingerprint import fingerprint
from adala_mm.utils.timm_models import PE_CORE, refuse_other_rotary

LINES = 24  # of a table of keys
# Keys that no plain backbone has: of the head and the pooling of timm and mmpretrain, and of the queries of `QueryViT`.
HEAD_KEYS = re.compile(r'(head|head_dist|fc_norm|attn_pool|query_embed)\.')
# Names in files of other libraries, which tools/convert_vfm.py reads.
CONVERTED = {re.compile(names): library for names, library in {
    r'dist_token$': 'distilled DeiT',
    r'storage_tokens$': 'official DINOv3',
    r'register_tokens$|blocks\.\d+\.\d+\.': 'official DINOv2',
    r'(\w+\.)?embeddings\.': 'transformers',
    r'(visual\.)?class_embedding$': 'OpenAI / OpenCLIP',
    r'(\w+\.)?patch_embed\.projection\.': 'mmpretrain'}.items()}


def read_backbone(init_cfg: dict) -> tuple[str, dict[str, Tensor], bool]:
    """Reads the file of ``init_cfg``: its path, the state dict of the backbone, and whether keys had the prefix.

    Raises:
        FileNotFoundError, ValueError: for a missing or unreadable file, and for any other ``init_cfg``.
    """
    options = dict(init_cfg)
    kind, path = options.pop('type', None), options.pop('checkpoint', None)
    prefix, key = options.pop('prefix', 'backbone.'), options.pop('key', None)
    if kind != 'Pretrained' or not path or options:
        raise ValueError("init_cfg must be dict(type='Pretrained', checkpoint=<file or timm://name>, key=<where in the "
                         'file, optional>, prefix=<of its names, optional>), and of a ViT also grid=<(h, w) of its '
                         f'positions, optional>; got {init_cfg}')
    state = read_state_dict(path, key=key)
    own = under(state, prefix)
    return path, own or state, bool(own)


def load_vit(model: nn.Module, init_cfg: dict) -> list[str]:
    """Loads ``init_cfg['checkpoint']`` into ``model``.

    Keys under ``prefix`` (default ``backbone.``) are taken if there are any, else the whole file is read as a timm
    state dict, in both cases without its head, pooling and query keys (`HEAD_KEYS`); ``key`` says where in the file
    they are, as of `read_state_dict`. Names of DINOv3 in timm are understood as well, and biases of zeros left
    out of a ViT without them. The patch kernel is resampled to the model's patch size (FlexiViT's pseudo-inverse, as in
    timm) and, from RGB, to its ``in_channels`` (for one channel the sum, as in timm: what a grey image normalised by
    one mean and std is to RGB). Position embeddings are resampled to its grid (bicubic, antialiased), and so are the
    tables over the grid that some attentions have. Parameters that only this attention variant has may be missing;
    nothing else may, and nothing may be left over.

    The grid of the positions in the file is ``init_cfg['grid']``, else the one that the file records (all that are
    written here do). Else it is assumed to be square, or if it cannot be, or stood under the prefix, the model's own.

    Returns:
        What was assumed though it might be otherwise; logged as a warning, too.

    Raises:
        FileNotFoundError, ValueError: for a missing or unreadable file.
        ValueError: for any other ``init_cfg`` type, for a grid that the positions do not have, for missing, unexpected
            or mis-shaped keys, for the weights of a linearized model with another attention, and for a name of timm
            whose rotary positions are not those of DINOv3.
    """
    init_cfg = dict(init_cfg)
    said = init_cfg.pop('grid', None)
    path, state, own = read_backbone(init_cfg)
    if path.startswith(TIMM):
        refuse_other_rotary(path.removeprefix(TIMM))
    if said is not None and (isinstance(said, str) or len(said) != 2 or not all(isinstance(n, int) for n in said)):
        raise ValueError(f'init_cfg.grid={said!r} must be (height, width) in patches, (16, 64) for instance')
    if said is not None and model.pos_embed is None:
        raise ValueError(f'init_cfg.grid={said!r} is that of position embeddings, and this ViT has rotary positions, '
                         'which fit any grid: leave it out')
    grid = recorded_grid(state) if said is None else tuple(said)
    if library := other_library(state):
        place = '.'.join(filter(None, (init_cfg.get('key'), own and init_cfg.get('prefix', 'backbone.').rstrip('.'))))
        raise ValueError(f'{path} holds weights of {library}, whose names and shapes are not those of AdaLAViT. '
                         f'Convert it, and name the result: python tools/convert_vfm.py {path} '
                         f'{Path(path).stem}_converted.safetensors{f" --key {place}" if place else ""}')
    if PE_CORE <= state.keys():
        raise ValueError(f'{path} holds weights of PE core ({", ".join(sorted(PE_CORE))}), whose rotary positions are '
                         "of another kind than DINOv3's, which AdaLAViT lacks; adala_mm.linearize takes timm's model "
                         'as it is')
    wanted = model.state_dict()
    dropped = [key for key in state if HEAD_KEYS.match(key) and key not in wanted]
    linear = recorded_linear(state)
    state = plain_names({key: value for key, value in state.items() if key not in dropped})
    problems = [layer.take_mark(state, f'{name}.') for name, layer in model.named_modules()
                if isinstance(layer, Attention)]
    if problem := next(filter(None, problems), None):
        raise ValueError(f'{path} is of a linearized model: {problem}')
    notes = _resample(model, state)
    here = {i: type(block.attn).__name__ for i, block in enumerate(model.blocks)}
    swapped = Counter((kind, here[i]) for i, kind in linear.items() if here.get(i, kind) != kind)
    notes += [f'{count} blocks of {there} are {now} here' for (there, now), count in swapped.items()]
    doubts = _fit_positions(model, state, grid, own, notes)

    idle = [key for key in state if key.endswith('.attn.qkv.bias') and key not in wanted and not state[key].any()]
    if idle:
        state = {key: value for key, value in state.items() if key not in idle}
        notes.append(f'left out {len(idle)} biases of queries, keys and values that are zero')
    if table := misfits({key: tuple(value.shape) for key, value in state.items()},
                        {key: tuple(value.shape) for key, value in wanted.items()}):
        hint = {(True, False): ' The file has position embeddings, and this ViT has rotary positions: leave out rotary',
                (False, True): ' The file has no position embeddings: if it is of DINOv3, say rotary=dict()',
                }.get(('pos_embed' in state, 'pos_embed' in wanted), '')
        raise ValueError(f'{path} does not fit this ViT:\n{table}\nIs it the model family that the config describes '
                         f'(width, depth, class token, registers, LayerScale, rotary, in_channels)?{hint}')
    model.load_state_dict(state, strict=False)
    note_loaded(model, state)
    new = [key for key in wanted if key not in state]
    print_log(f'AdaLAViT: {len(state)} tensors from {path}'
              + (f'; dropped {", ".join(dropped)}' if dropped else '')
              + (f'; {"; ".join(notes)}' if notes else '')
              + (f'; new in this variant: {len(new)} tensors' if new else '')
              + f'; fingerprint {model.loaded[1]}', logger='current')
    for doubt in doubts:
        print_log(f'{path}: {doubt}', logger='current', level=logging.WARNING)
    return doubts


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames weights of DINOv3 in timm's ``Eva`` to the names of ``VisionTransformer``: LayerScale, and qkv's biases.

    Other models of ``Eva`` have other rotary positions, which no weight shows. Their names stay, so that they fit no
    `AdaLAViT`.
    """
    if 'pos_embed' in state or not {'cls_token', 'reg_token'} <= state.keys():
        return state
    plain = {re.sub(r'^(blocks\.\d+)\.gamma_(\d)$', r'\1.ls\2.gamma', key): value for key, value in state.items()}
    for key in [key for key in plain if re.fullmatch(r'blocks\.\d+\.attn\.q_bias', key)]:
        start, q = key.removesuffix('q_bias'), plain.pop(key)
        v = plain.pop(f'{start}v_bias', torch.zeros_like(q))
        plain[f'{start}qkv.bias'] = torch.cat([q, torch.zeros_like(q), v])
    return plain


def other_library(state: dict[str, Tensor]) -> str | None:
    """The library whose names these are, if `CONVERTED` knows them; else None."""
    found = next((library for pattern, library in CONVERTED.items() if any(map(pattern.match, state))), None)
    # MAE has no LayerScale
    if not found and 'mask_token' in state and any(key.endswith('.ls1.gamma') for key in state):
        return 'official DINOv2'
    return found


def misfits(found: dict[str, tuple], wanted: dict[str, tuple]) -> str:
    """A table of missing, unexpected and mis-shaped keys; an empty string if all fit.

    Keys that differ only in the number of their block share a line.

    Args:
        found, wanted: shapes by key, in the file and in the model. Keys that only an attention variant has may be
            missing.
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
    """Records keys and fingerprint of the loaded tensors in ``model.loaded``, which `WeightsCheckHook` reads."""
    state = model.state_dict()
    model.loaded = tuple(keys), fingerprint({key: state[key] for key in keys})


def is_extra(key: str) -> bool:
    """Whether a parameter or module is an addition to the plain ViT: of an attention variant, or queries."""
    return re.match(r'query_embed|blocks\.\d+\.attn\.(?!(qkv|proj)(\.|$))', key) is not None


def _resample(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Fits the patch kernel and the tables of attentions to the model, in place; returns a list of what was done."""
    notes = []
    size, grid = model.patch_size, model.pos_grid
    kernel, channels = state.get('patch_embed.proj.weight'), model.patch_embed.proj.in_channels
    if kernel is not None and kernel.ndim == 4 and kernel.shape[1] == 3 != channels:
        kernel = state['patch_embed.proj.weight'] = adapt_input_conv(channels, kernel)
        notes.append('patch kernel summed over RGB for in_channels=1' if channels == 1 else
                     f'patch kernel of RGB repeated and scaled for in_channels={channels}')
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
    return notes


def _fit_positions(model: nn.Module, state: dict[str, Tensor], grid: tuple[int, int] | None, own: bool,
                   notes: list[str]) -> list[str]:
    """Fits position embeddings to the grid of the model, in place; returns what is in doubt about it.

    ``grid`` is the grid of the file; it is None if neither the file nor the user states it. Then a square grid is
    assumed. The model's grid is assumed instead if the embeddings cannot form a square, or if the file is one of ours
    (``own``) and has as many embeddings as the model.
    """
    position = state.get('pos_embed')
    if position is None or model.pos_embed is None:
        return []
    prefix = 0 if model.no_embed_class else model.num_prefix
    patches, wanted = position.shape[1] - prefix, model.pos_grid
    side = math.isqrt(max(patches, 0))
    square, doubts = (side, side), []
    if grid is None:
        fits = patches == math.prod(wanted)
        if side * side != patches or side == 0:
            grid = wanted if fits else None
        else:
            grid = wanted if fits and own else square
            if fits and wanted != square:
                other = square if own else wanted
                doubts.append(f'its {patches} positions are read as a grid of {grid[0]}x{grid[1]}, and might be '
                              f'{other[0]}x{other[1]}: the file does not record it. Say init_cfg.grid={grid}, or '
                              f'{other}')
        if grid is not None and not doubts:
            notes.append(f'positions read as {grid[0]}x{grid[1]}, as no grid is recorded (init_cfg.grid)')
    if grid is None or math.prod(grid) != patches:
        stated = 'no square grid' if grid is None else f'not the grid of {grid[0]}x{grid[1]} that is said or recorded,'
        raise ValueError(f'pos_embed of the checkpoint has {position.shape[1]} entries: {stated} plus {prefix} class '
                         'and register tokens, so it cannot be resized. Check class_token, num_registers and '
                         'no_embed_class; init_cfg.grid=(height, width) in patches says a grid that is not square')
    resize_positions(model, state, 'pos_embed', grid, notes)
    return doubts


def resample_positions(positions: Tensor, grid: Sequence[int], wanted: Sequence[int], num_prefix: int) -> Tensor:
    """Position embeddings (1, P + h w, C) of the grid (h, w) for another one, bicubic with antialiasing as in timm.

    Args:
        grid, wanted: (h, w) of what there is and of what is asked for.
        num_prefix: P, embeddings of class and register tokens, which stay as they are.
    """
    return resample_abs_pos_embed(positions, list(wanted), old_size=list(grid), num_prefix_tokens=num_prefix)


def resize_positions(model: nn.Module, state: dict[str, Any], key: str, grid: tuple[int, int],
                     notes: list[str]) -> None:
    """Resamples the position embeddings ``state[key]`` of ``grid`` to the model's grid, in place, if there are any."""
    if tuple(grid) == model.pos_grid or key not in state:
        return
    state[key] = resample_positions(state[key], grid, model.pos_grid, 0 if model.no_embed_class else model.num_prefix)
    notes.append(f'positions {grid[0]}x{grid[1]} -> {model.pos_grid[0]}x{model.pos_grid[1]}')


def positions_for(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a whole model; if it records another grid, positions are resampled to the ``backbone``'s."""
    grid, fitted, backbone = recorded_grid(state, 'backbone'), dict(state), getattr(model, 'backbone', None)
    if grid is not None and hasattr(backbone, 'pos_grid'):
        resize_positions(backbone, fitted, 'backbone.pos_embed', grid, [])
    return fitted


def record_facts(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """A hook of ``state_dict()`` that records the grid of positions and the linear blocks, which no key shows."""
    metadata['grid'] = model.pos_grid
    metadata['linear_blocks'] = {i: type(block.attn).__name__ for i, block in enumerate(model.blocks)
                                 if not block.attn.is_softmax}


def read_grid(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict, *_: Any) -> None:
    """A hook of ``load_state_dict()``, and of MMEngine's, that resamples positions if the file records another grid."""
    key, notes = f'{prefix}pos_embed', []
    grid, prefixed = metadata.get('grid'), 0 if model.no_embed_class else model.num_prefix
    if grid is not None and key in state and state[key].shape[1] == math.prod(grid) + prefixed:
        resize_positions(model, state, key, grid, notes)
    for note in notes:
        print_log(f'AdaLAViT: {note}', logger='current')
