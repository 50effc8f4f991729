"""Short names for the exact contents of tensors and files."""
from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of SHA-256 over names, dtypes, shapes and bytes: equal only if every bit is."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def sources_fingerprint() -> str:
    """First 16 hex digits of SHA-256 over this package's Python files, and a clone's analysis tools."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted([*package.glob('**/*.py'), *package.parent.glob('tools/analysis_tools/*.py')]):
        digest.update(f'{path.relative_to(package.parent)} '.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file in hex digits, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while piece := file.read(2 ** 24):
            digest.update(piece)
    return digest.hexdigest()
