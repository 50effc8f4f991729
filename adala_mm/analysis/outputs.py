"""Where results go, and what is written down with them."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from adala_mm.analysis.networks import Network
from adala_mm.utils.machine import git_state, hardware
from adala_mm.utils.records import save
from adala_mm.utils.stack import stack_versions
from adala_mm.version import __version__


def require_free(path: Path, overwrite: bool) -> None:
    """Raises FileExistsError if there is a file already that may not be replaced."""
    if path.exists() and not overwrite:
        raise FileExistsError(f'{path} is there already: say --overwrite to replace it, or another --out')


def outputs(args: argparse.Namespace, name: str) -> tuple[Path, Path]:
    """``<out>/<name>.json`` and ``.png``; to be asked for before the work begins.

    Raises:
        FileExistsError: if there is one already, without ``--overwrite``.
    """
    paths = args.out / f'{name}.json', args.out / f'{name}.png'
    for path in paths:
        require_free(path, args.overwrite)
    return paths


def write(path: Path, data: dict, device: str = 'cpu', networks: Sequence[Network] = ()) -> None:
    """Writes results as JSON, with what they depend on: networks, code, versions, machine."""
    save(path, data | dict(networks=[network.record for network in networks], source=git_state(),
                           versions=dict(adala_mm=__version__) | stack_versions(),
                           machine=hardware(torch.device(device))))
