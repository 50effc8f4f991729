"""The two files that ``torch.save`` writes: zip archives, and before PyTorch 1.6 pickles in a row."""
from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import default_restore_location

from adala_mm.utils.pickle_makers import OTHER_ORDER, Refused, check
from adala_mm.utils.unpickling import Machine

Place = Callable[[torch.UntypedStorage, str], torch.UntypedStorage]


def read_torch_file(path: Path, map_location: Any) -> Any:
    """What ``torch.save`` wrote, by a `Machine` that makes data and nothing else.

    No size is believed that the file is too small for, before memory is taken. With ``map_location='meta'`` the content
    of tensors is not read.

    Raises:
        Refused: if it holds anything else.
        Exception: of any kind, if it is damaged.
    """
    def place(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        if callable(map_location):
            return map_location(storage, location) or default_restore_location(storage, location)
        if isinstance(map_location, dict):
            location = map_location.get(location, location)
        elif map_location is not None:
            location = str(map_location)
        return default_restore_location(storage, location)

    size = path.stat().st_size
    with path.open('rb') as file:
        if file.peek(2).startswith(b'PK'):
            return _read_archive(file, size, place, without_content=str(map_location) == 'meta')
        return _read_stream(file, size, place)


def _read_bytes(file: BinaryIO, count: int) -> torch.UntypedStorage:
    content = torch.empty(count, dtype=torch.uint8)
    check(file.readinto(content.numpy()) == count, 'it ends too early')
    return content.untyped_storage()


def _read_archive(file: BinaryIO, size: int, place: Place, without_content: bool) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(name.endswith('constants.pkl') for name in entries):
            raise Refused('a TorchScript archive, which is code')
        unpacked = sum(entry.file_size for entry in archive.infolist())
        check(unpacked <= size, f'it is compressed, as torch.save never does it: {size} bytes unpack to {unpacked}. If '
              'you know that size for the right one, unzip it, and zip it again with -0')
        root = next(name for name in entries if name.endswith('data.pkl')).removesuffix('data.pkl')
        order = f'{root}byteorder'
        check(order not in entries or archive.read(order).decode() == sys.byteorder, OTHER_ORDER)
        storages: dict[str, torch.UntypedStorage] = {}

        def take(key: str, count: int, location: str) -> torch.UntypedStorage:
            entry = entries[f'{root}data/{key}']
            check(entry.file_size == count, f'{entry.filename} has {entry.file_size} bytes, not {count}')
            if key not in storages:
                with archive.open(entry) as content:
                    storages[key] = (torch.UntypedStorage(count, device='meta') if without_content else
                                     place(_read_bytes(content, count), location))
            return storages[key]

        with archive.open(f'{root}data.pkl') as content:
            return Machine(content, size, take).load()


def _read_stream(file: BinaryIO, size: int, place: Place) -> Any:
    magic, protocol, system = (Machine(file, size).load() for _ in range(3))
    check((magic, protocol) == (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION),
          'it is of another version')
    check(system['little_endian'] == (sys.byteorder == 'little'), OTHER_ORDER)
    storages: dict[str, torch.UntypedStorage] = {}
    left = size

    def take(key: str, count: int, location: str) -> torch.UntypedStorage:
        nonlocal left
        if key not in storages:
            left -= count
            check(left >= 0, f'its {size} bytes are fewer than those of its tensors')
            storages[key] = place(torch.UntypedStorage(count), location)
        check(storages[key].nbytes() == count, f'storage {key} has two sizes')
        return storages[key]

    state = Machine(file, size, take).load()
    keys = Machine(file, size).load()
    check(sorted(keys) == sorted(storages), 'its list of storages is another')
    for key in keys:
        count, values = storages[key].nbytes(), int.from_bytes(file.read(8), 'little')
        check(count in {values * itemsize for itemsize in (1, 2, 4, 8, 16)}, f'storage {key} has {values} values')
        storages[key].copy_(_read_bytes(file, count))
    return state
