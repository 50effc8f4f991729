"""Images inside plain tar files, each addressed by where its bytes lie."""
from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator

from mmengine.fileio import BaseStorageBackend, register_backend

ADDRESS = re.compile(r'(?P<shard>.+?)\?(?P<offset>\d+)\+(?P<size>\d+)#(?P<name>.*)', re.DOTALL)
FIX = 'Unpack it to a plain .tar (gunzip, zstd -d ...); JPEGs are compressed already and it hardly grows'


def expand_shards(root: str, pattern: str) -> list[str]:
    """Paths below ``root`` that a pattern of webdataset names, such as ``in22k-{000000..000999}.tar``, in its order.

    Unlike webdataset's, a pattern may have wildcards as well (``n*.tar``): what they match is sorted by name.

    Raises:
        ValueError: if the braces do not pair.
        FileNotFoundError: if a shard is not there, or wildcards match nothing.
    """
    from webdataset.shardlists import expand_urls  # slow to import, and of use here only
    try:
        names = expand_urls(pattern)
    except ValueError as error:
        raise ValueError(f'shards={pattern!r} is no pattern ({error}): write in22k-{{000000..000999}}.tar') from error
    shards = []
    for name in names:
        if has_wildcards(name):
            matched = sorted(glob.glob(name, root_dir=root))
            if not matched:
                raise FileNotFoundError(f'no shard {name} in {root}. Correct `shards`, or `data_root`')
            shards += matched
        else:
            shards.append(name)
    absent = [shard for shard in shards if not os.path.isfile(os.path.join(root, shard))]
    if absent:
        raise FileNotFoundError(
            f'{len(absent):,} of the {len(shards):,} shards {pattern} are not in {root or "."}, the first being '
            f'{absent[0]}. Correct the range in `shards`, or `data_root`, or fetch what is missing')
    return shards


def has_wildcards(pattern: str) -> bool:
    return any(character in pattern for character in '*?[')


def scan_shard(root: str, shard: str) -> Iterator[tuple[str, str | None]]:
    """Name and address, ``shard?offset+size#name``, of every file in a tar file, by reading its headers only.

    The last item is ``('', problem)``; the problem is None if the shard is whole.

    Raises:
        ValueError: if the file is compressed, or no tar file at all.
    """
    path = os.path.join(root, shard)
    try:
        archive = tarfile.TarFile(path)
    except tarfile.ReadError as error:
        with open(path, 'rb') as file:
            magic = file.read(6)
        if magic.startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')):
            raise ValueError(f'{path} is compressed, and images cannot be read from its middle. {FIX}') from error
        raise ValueError(f'{path} is no tar file ({error}). Fetch it again, or leave it out of `shards`') from error
    with archive:
        problem = None
        try:
            while (member := archive.next()) is not None:
                archive.members = []  # or it keeps every header
                if member.isreg() and not member.issparse():
                    yield member.name, f'{shard}?{member.offset_data}+{member.size}#{member.name}'
        except tarfile.ReadError:
            problem = 'ends within a file'
        else:
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                problem = f'is damaged or cut off at byte {archive.offset:,}'
    yield '', problem


class TarBackend(BaseStorageBackend):
    """MMEngine's way to ``tar://shard?offset+size#name``, so that ``LoadImageFromFile`` reads shards like files.

    The shard is opened for each file: nothing is shared between processes, and nothing is left open.

    Raises:
        ValueError: if the address is none, or the shard ends within the file.
    """

    def get(self, filepath: str) -> bytes:
        found = ADDRESS.fullmatch(filepath.removeprefix('tar://'))
        if found is None:
            raise ValueError(f'{filepath} is not of the form tar://shard?offset+size#name')
        size = int(found['size'])
        with open(found['shard'], 'rb', buffering=0) as file:
            content = os.pread(file.fileno(), size, int(found['offset']))
        if len(content) < size:
            raise ValueError(f'the shard ends {size - len(content):,} bytes before the end of this file')
        return content

    def get_text(self, filepath: str, encoding: str = 'utf-8') -> str:
        return self.get(filepath).decode(encoding)


register_backend('tar', TarBackend, prefixes='tar', force=True)
