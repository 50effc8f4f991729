"""Reads checkpoints without ever running code that came with them, unless the user said so."""
from __future__ import annotations

import difflib
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mmengine.runner.checkpoint
import torch
from mmengine.fileio import get_file_backend
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adala_mm.utils.fingerprint import file_sha256
from adala_mm.utils.pickle_makers import Refused
from adala_mm.utils.torch_files import read_torch_file
from adala_mm.utils.weight_files import SAFETENSORS, UnreadableCheckpoint, kind_of, weight_files

# Where training scripts keep a model's weights in their checkpoints, in order of preference.
WRAPPERS = ('state_dict', 'model', 'state_dict_ema', 'model_ema', 'ema_state_dict')
# What wrappers of modules put into the names of weights, and what averaging counts its steps with.
WRAPPED = re.compile(r'^(module\.)+|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
COUNTERS = ('n_averaged', 'steps')

TIMM = 'timm://'
# The user's word that this process may unpickle what it is told to load (`--trust-checkpoint`); also for its children.
TRUST = 'ADALA_MM_TRUST_CHECKPOINT'


def load_checkpoint(path: str | Path, map_location: Any = 'cpu', trust: bool = False) -> dict[str, Any]:
    """Reads a safetensors file, or a ``torch.save`` file by `read_torch_file`, whatever it is called.

    The position grid that a safetensors file records is given as `recorded_grid` reads it.

    Args:
        path: a local file, a folder of Hugging Face (``model.safetensors``, or an index and its shards), or an index.
        map_location: as of ``torch.load``.
        trust: unpickle whatever the file holds. It may run any code: for files of your own only.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableCheckpoint: if it is truncated, no checkpoint, or would need to run code to load; a ValueError.
    """
    parts = [_load_file(file, map_location, trust or os.environ.get(TRUST) == '1')
             for file in weight_files(Path(path).expanduser())]
    if len(parts) == 1:
        return parts[0]
    return {key: value for part in parts for key, value in part.items()}


def _load_file(path: Path, map_location: Any, trust: bool) -> dict[str, Any]:
    try:
        if kind_of(path) == SAFETENSORS:
            with safe_open(path, 'pt') as file:
                state = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118  no mapping
                note_grid(state, (file.metadata() or {}).get('position_grid'))
            return state
        if trust:
            return torch.load(path, map_location=map_location, weights_only=False)
        return read_torch_file(path, map_location)
    except Exception as error:  # what is damaged raises a dozen types for what is the same to the user
        text = ''.join(letter if letter.isprintable() else ' ' for letter in str(error)).strip()
        reason = text[:300] or type(error).__name__
        if isinstance(error, Refused):
            reason = (f'it holds more than tensors and plain values, which is never unpickled here ({reason}). If it '
                      f'is your own, and needs that: --trust-checkpoint of a tool, {TRUST}=1 in the environment of a '
                      'program, or trust=True of load_checkpoint and read_state_dict')
        elif not reason.startswith('it is '):
            reason = f'it is truncated or damaged: fetch it again ({reason})'
        raise UnreadableCheckpoint(f'cannot read the checkpoint {path}: {reason}') from error


def file_notes(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself (``metadata``), read without its tensors; {} for any other file."""
    try:
        if not path.is_file() or kind_of(path) != SAFETENSORS:
            return {}
        with safe_open(path, 'pt') as file:
            return file.metadata() or {}
    except (ValueError, SafetensorError):  # told by whoever loads it
        return {}


def grid_note(state: dict[str, Any]) -> dict[str, str]:
    """What `note_grid` reads, for the metadata of a safetensors file; {} if no grid is recorded."""
    owner = _owner(state)
    grid = None if owner is None else recorded_grid(state, owner)
    return {} if grid is None else {'position_grid': 'x'.join(map(str, grid))}


def _owner(state: dict[str, Any]) -> str | None:
    """Prefix of the module with position embeddings."""
    return next((key.removesuffix('pos_embed').rstrip('.') for key in state if key.endswith('pos_embed')), None)


def note_grid(state: OrderedDict[str, Any], grid: str | None) -> None:
    """Puts the position grid ``16x64`` of a file where `AdaLAViT.state_dict` has it: in the metadata of torch."""
    owner = _owner(state)
    if grid is not None and owner is not None:
        state._metadata = OrderedDict({owner: {'grid': tuple(map(int, grid.split('x')))}})


def recorded_grid(state: dict[str, Any], prefix: str = '') -> tuple[int, int] | None:
    """(h, w) of the position embeddings ``<prefix>pos_embed``, if the file that ``state`` was read from records it."""
    grid = getattr(state, '_metadata', {}).get(prefix.rstrip('.'), {}).get('grid')
    return None if grid is None else tuple(grid)


def recorded_linear(state: dict[str, Any]) -> dict[int, str]:
    """Linear attentions by block of the `AdaLAViT` in ``state``; {} if it has none, or the file records nothing."""
    records = (about.get('linear_blocks') for about in getattr(state, '_metadata', {}).values())
    return next(filter(None, records), {})


def hub_file(name: str) -> tuple[str, str]:
    """Repository and file on the Hugging Face hub of timm's pretrained model ``name``, as timm's own table has them.

    Repositories do not always bear the model's name: ``vit_large_patch14_clip_quickgelu_224.openai`` has its weights in
    ``timm/vit_large_patch14_clip_224.openai``.

    Raises:
        ValueError: if the installed timm knows no such model, or no file of it on the hub.
    """
    import timm
    try:
        facts = timm.get_pretrained_cfg(name)
    except RuntimeError:  # timm knows the architecture, but not these weights
        facts = None
    if facts is None or not facts.hf_hub_id:
        near = difflib.get_close_matches(name, timm.list_pretrained())
        raise ValueError(f'timm {timm.__version__} knows no weights on the Hugging Face hub for {TIMM}{name}; '
                         + (f'did you mean {TIMM}{near[0]}?' if near else 'timm.list_pretrained() has the names.')
                         + ' Weights of another place: download the file and name it as init_cfg.checkpoint')
    return facts.hf_hub_id, facts.hf_hub_filename or 'model.safetensors'


def hub_url(name: str) -> str:
    """Address of what `hub_file` names."""
    return 'https://huggingface.co/{}/resolve/main/{}'.format(*hub_file(name))


def local_file(path: str) -> Path:
    """Where the checkpoint of that name lies on this machine.

    Args:
        path: a local file, or ``timm://NAME``, where timm's model of that name has its weights, downloaded once.

    Raises:
        ValueError: if timm knows no such model, or its file cannot be downloaded.
    """
    if not path.startswith(TIMM):
        return Path(path).expanduser()
    from huggingface_hub import hf_hub_download
    name = path.removeprefix(TIMM)
    repository, file = hub_file(name)
    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError) as error:
        raise ValueError(f'cannot download {path} ({type(error).__name__}): is there a connection? Fetch '
                         f'{hub_url(name)} on another machine and name that file as init_cfg.checkpoint') from error


def downloaded(url: str, folder: str | Path | None = None) -> Path:
    """The file in which MMEngine keeps what it downloads from ``url``: in ``folder``, or in PyTorch's cache."""
    return Path(folder or Path(torch.hub.get_dir(), 'checkpoints'), url.rsplit('/', 1)[-1].split('?')[0])


def checkpoint_sha256(name: str) -> str | None:
    """SHA-256 of the file, or of each of several files, that a name stands for; None if it is not on this machine."""
    path = downloaded(name) if '://' in name and not name.startswith(TIMM) else name
    try:
        return ' '.join(map(file_sha256, weight_files(local_file(str(path)))))
    except (OSError, ValueError):
        return None


def read_state_dict(path: str, trust: bool = False, key: str | None = None) -> OrderedDict[str, Tensor]:
    """Tensors of a checkpoint by name, without what training wraps around a model; `recorded_grid` reads it, too.

    They are taken from the first of `WRAPPERS` that the file has; averaged weights (EMA) only where there are no others
    (MMEngine's hook keeps them under ``state_dict`` already). Names lose the parts that DDP, ``torch.compile``, FSDP,
    activation checkpointing and averaging add; states of optimizers are left where they are.

    Args:
        path: as of `local_file`.
        trust: as of `load_checkpoint`.
        key: where the weights are if not there: ``teacher``, or ``teacher.backbone`` for entries in entries. An entry
            of the file is meant, or what names begin with.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`, and for a file without named tensors.
    """
    state = load_checkpoint(local_file(path), trust=trust)
    if isinstance(state, torch.nn.Module):  # OpenAI's CLIP files, which are TorchScript and need trust
        state = state.state_dict()
    whole = state
    if key is not None and (state := entry(whole, key)) is None:
        raise ValueError(f'{path} has nothing under key={key!r}, only: {", ".join(map(str, list(whole)[:8]))}')
    while isinstance(state, dict) and (inner := [state[w] for w in WRAPPERS if isinstance(state.get(w), dict)]):
        state = inner[0]
    if not isinstance(state, dict):
        raise ValueError(f'{path} holds a {type(state).__name__}, not named tensors: save model.state_dict()')
    tensors = OrderedDict((WRAPPED.sub('', name), value) for name, value in state.items()
                          if isinstance(name, str) and isinstance(value, Tensor) and name not in COUNTERS)
    if not tensors:
        inside = ' or '.join(f"'{name}'" for name, value in state.items() if isinstance(value, dict)
                             and any(isinstance(part, Tensor) for part in value.values()))
        raise ValueError(f'{path} holds no named tensors, only: {", ".join(map(str, list(state)[:8]))}'
                         + (f'. Say which: key={inside} in init_cfg, --key of tools/convert_vfm.py' if inside else
                            '. Save model.state_dict()'))
    tensors._metadata = OrderedDict((WRAPPED.sub('', f'{name}.').rstrip('.'), value)
                                    for name, value in getattr(state, '_metadata', {}).items())
    return tensors


def entry(state: Any, key: str) -> dict | None:
    """What stands under a dotted ``key``: an entry, one of an entry (or of `WRAPPERS`), or the names that begin so."""
    if not isinstance(state, dict):
        return None
    if isinstance(state.get(key), dict):
        return state[key]
    head, _, rest = key.partition('.')
    if rest and isinstance(state.get(head), dict):
        return entry(state[head], rest)
    if named := under(state, f'{key}.'):
        return named
    inside = (entry(state[wrapper], key) for wrapper in WRAPPERS if wrapper in state)
    return next((found for found in inside if found is not None), None)


def under(state: dict, prefix: str) -> OrderedDict:
    """The entries whose names begin with ``prefix``, without it."""
    named = OrderedDict((name[len(prefix):], value) for name, value in state.items() if str(name).startswith(prefix))
    named._metadata = OrderedDict((f'{name}.'[len(prefix):].rstrip('.'), value) for name, value in
                                  getattr(state, '_metadata', {}).items() if f'{name}.'.startswith(prefix))
    return named


def use_safe_loading() -> None:
    """Makes MMEngine read files, wherever they are, with `load_checkpoint`: load_from, resume, init_cfg, inferencers.

    Called by `adala_mm.openmmlab`.
    """

    def load_url(url: str, model_dir: str | None = None, map_location: Any = None, progress: bool = True) -> dict:
        path = downloaded(url, model_dir)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=progress)
        return load_checkpoint(path, map_location)

    def load_local(filename: str, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load_checkpoint(filename, map_location)

    def load_remote(filename: str, map_location: Any = None, backend: str = 'petrel') -> dict[str, Any]:
        with get_file_backend(filename, backend_args={'backend': backend}).get_local_path(filename) as path:
            return load_checkpoint(path, map_location)

    mmengine.runner.checkpoint.load_url = load_url  # what its schemes of the web end in
    mmengine.runner.checkpoint._safe_torch_load = load_local  # pavi and openmmlab; it unpickles what torch refuses
    CheckpointLoader.register_scheme('', load_local, force=True)
    CheckpointLoader.register_scheme([r'(\S+\:)?s3://', r'(\S+\:)?petrel://'], load_remote, force=True)
