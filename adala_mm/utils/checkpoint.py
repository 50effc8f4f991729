"""Reads checkpoints without ever running code that came with them, unless the user said so."""
from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor


def _history_method(cls: type, name: str) -> Any:
    """Stands in for ``getattr``, which MMEngine's pickled log buffers ask for: four methods of one class, no more."""
    if cls is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(cls, name)
    raise ValueError(f'a checkpoint asked for {cls!r}.{name}, which no training checkpoint needs')


# All that MMEngine puts into a checkpoint beside tensors and plain Python values.
SAFE_GLOBALS = [
    (_history_method, 'builtins.getattr'), HistoryBuffer, np.ndarray, np.dtype,
    *((f, f'numpy.{core}.multiarray.{f.__name__}') for core in ('core', '_core')  # numpy 1 and 2 name them differently
      for f in (np._core.multiarray._reconstruct, np._core.multiarray.scalar)),
    *{type(np.dtype(t)) for t in '?bBhHiIlLqQefdFDUS'},
]


# Where training scripts keep a model's weights in their checkpoints, in order of preference.
WRAPPERS = ('state_dict', 'model', 'state_dict_ema', 'model_ema', 'ema_state_dict')
# What wrappers of modules put into the names of weights, and what averaging counts its steps with.
WRAPPED = re.compile(r'^(module\.)+|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
COUNTERS = ('n_averaged', 'steps')

TIMM = 'timm://'
# The user's word that this process may unpickle what it is told to load (`--trust-checkpoint`); also for its children.
TRUST = 'ADALA_MM_TRUST_CHECKPOINT'


def load_checkpoint(path: str | Path, map_location: Any = 'cpu', trust: bool = False) -> dict[str, Any]:
    """Reads a ``.safetensors`` file, or a ``torch.save`` file with ``weights_only=True``.

    Args:
        path: a local file.
        map_location: as of ``torch.load``.
        trust: unpickle whatever the file holds. It may run any code: for files of your own only.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, no checkpoint, or would need to run code to load.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint at {path}: check the path, or run the stage that writes it first')
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file
            return load_file(path)
        if trust or os.environ.get(TRUST) == '1':
            return torch.load(path, map_location=map_location, weights_only=False)
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen types for what is the same to the user
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if 'Unsupported' in line), lines[0])
        if 'TorchScript' in reason:
            reason = 'a TorchScript archive, which is code'
        raise ValueError(f'cannot read the checkpoint {path}: it is truncated, not a checkpoint, or holds more than '
                         f'tensors and plain values, which is never unpickled here ({reason}). If it is your own, and '
                         'needs that, say --trust-checkpoint') from error


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


def read_state_dict(path: str, trust: bool = False) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, without what training wraps around a model.

    They are taken from the first of `WRAPPERS` that the file has; averaged weights (EMA) only where there are no others
    (MMEngine's hook keeps them under ``state_dict`` already). Names lose the parts that DDP, ``torch.compile``, FSDP,
    activation checkpointing and averaging add; states of optimizers are left where they are.

    Args:
        path: as of `local_file`.
        trust: as of `load_checkpoint`.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`, and for a file without named tensors.
    """
    state = load_checkpoint(local_file(path), trust=trust)
    if isinstance(state, torch.nn.Module):  # OpenAI's CLIP files, which are TorchScript and need trust
        state = state.state_dict()
    while isinstance(state, dict) and (inner := [state[w] for w in WRAPPERS if isinstance(state.get(w), dict)]):
        state = inner[0]
    if not isinstance(state, dict):
        raise ValueError(f'{path} holds a {type(state).__name__}, not named tensors')
    tensors = {WRAPPED.sub('', key): value for key, value in state.items()
               if isinstance(key, str) and isinstance(value, Tensor) and key not in COUNTERS}
    if not tensors:
        raise ValueError(f'{path} holds no named tensors, only: {", ".join(map(str, list(state)[:8]))}')
    return tensors


def use_safe_loading() -> None:
    """Makes MMEngine read local and downloaded files with `load_checkpoint`: load_from, resume, init_cfg, inferencers.

    Called by `adala_mm.openmmlab`.
    """

    def load_url(url: str, model_dir: str | None = None, map_location: Any = None, progress: bool = True) -> dict:
        folder = Path(model_dir or Path(torch.hub.get_dir()) / 'checkpoints')
        path = folder / url.rsplit('/', 1)[-1].split('?')[0]
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=progress)
        return load_checkpoint(path, map_location)

    mmengine.runner.checkpoint.load_url = load_url  # what all of its remote schemes end in

    @CheckpointLoader.register_scheme(prefixes='', force=True)
    def load_local(filename: str, map_location: Any) -> dict[str, Any]:
        return load_checkpoint(filename, map_location)
