"""Images inside plain tar files, each addressed by where its bytes lie."""
from __future__ import annotations

import glob
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from mmengine.fileio import BaseStorageBackend, register_backend

from adala_mm.utils.folders import is_hidden

ADDRESS = re.compile(r'(?P<shard>.+?)\?(?P<offset>\d+)\+(?P<size>\d+)#(?P<name>.*)', re.DOTALL)
MAX_LINKS = 40  # in a row, as of Linux
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


class Shard(NamedTuple):
    """What is in a tar file, by the names that files get when it is unpacked."""

    files: dict[str, str]  # name: address, shard?offset+size#name
    again: list[str]  # names of which there is a later file
    lost: list[str]  # files whose bytes lie in pieces, or in another archive
    dead: list[str]  # links that lead to nothing in this archive
    problem: str | None  # where it is damaged


def scan_shard(root: str, shard: str) -> Shard:
    """Files of a tar file, by reading its headers only.

    Links to files are files, hard and symbolic ones. One to a folder is passed over: what it leads to has a way of its
    own. What follows an end mark is read as well, as in archives that were joined by ``cat``.

    Raises:
        ValueError: if the file is compressed, or no tar file at all.
    """
    path = os.path.join(root, shard)
    check_kind(path)
    spans: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    again, lost, folders, problem = [], [], set(), None
    try:
        for member in members(path):
            name, target = unpacked(member.name), unpacked(member.linkname)
            if member.isdir():
                folders.add(name)
            elif member.issym() or (member.islnk() and target in links):
                spans.pop(name, None)
                links[name] = member.linkname if member.issym() else links[target]
            elif member.isreg() or member.islnk():
                span = spans.get(target) if member.islnk() else (member.offset_data, member.size)
                if span is None or member.issparse():
                    lost.append(name)
                    continue
                if name in spans:
                    again.append(name)
                spans[name] = span
                links.pop(name, None)
    except tarfile.ReadError as error:
        problem = str(error)
    ends = {name: follow(name, links) for name in links}
    spans |= {name: spans[end] for name, end in ends.items() if end in spans}
    if ends:
        folders.update(place for name in spans for place in parents(name))
    dead = [name for name, end in ends.items() if name not in spans and (end not in folders or is_hidden(end))]
    files = {name: f'{shard}?{offset}+{size}#{name}' for name, (offset, size) in spans.items()}
    return Shard(files, again, lost, dead, problem)


def check_kind(path: str) -> None:
    """ValueError for a file that is compressed, or no tar file at all."""
    try:
        tarfile.TarFile(path).close()
    except tarfile.ReadError as error:
        with open(path, 'rb') as file:
            magic = file.read(6)
        if magic.startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')):
            raise ValueError(f'{path} is compressed, and images cannot be read from its middle. {FIX}') from error
        raise ValueError(f'{path} is no tar file ({error}). Fetch it again, or leave it out of `shards`') from error


def members(path: str) -> Iterator[tarfile.TarInfo]:
    """All of a tar file, end marks passed over.

    Raises:
        tarfile.ReadError: saying where it is damaged.
    """
    with open(path, 'rb') as file:
        size, begin = os.fstat(file.fileno()).st_size, 0
        while begin < size:
            file.seek(begin)
            try:
                archive = tarfile.TarFile(path, fileobj=file)
                while (member := archive.next()) is not None:
                    archive.members = []  # or it keeps every header
                    yield member
            except tarfile.ReadError as error:
                raise tarfile.ReadError('ends within a file') from error
            begin = after_zeros(file, archive.offset)
            if begin == archive.offset:  # an end mark is a block of zeros
                raise tarfile.ReadError(f'is damaged or cut off at byte {begin:,}')


def after_zeros(file: BinaryIO, offset: int) -> int:
    """Where the first block begins, from ``offset`` on, that is not all zeros; the end of the file if none is."""
    file.seek(offset)
    while chunk := file.read(2 ** 20):
        offset += len(chunk)
        if rest := len(chunk.lstrip(b'\0')):
            return (offset - rest) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return offset


def unpacked(name: str) -> str:
    """The path of a file when it is unpacked: ``./a//b.jpg`` is ``a/b.jpg``, and so is ``/a/b.jpg``."""
    return posixpath.normpath(name).lstrip('/')


def parents(path: str) -> list[str]:
    """All folders that a path goes through, from its own up to the root, which is ''."""
    return [place := posixpath.dirname(path), *(parents(place) if place else ())]


def follow(name: str, links: dict[str, str]) -> str | None:
    """Where a path in an archive with these links leads; None if out of it, or round in circles."""
    parts, path, followed = name.split('/')[::-1], [], 0
    while parts:
        part = parts.pop()
        if part == '..' and not path:
            return None
        if part == '..':
            path.pop()
        elif part not in ('', '.'):
            path.append(part)
            target = links.get('/'.join(path))
            if target is not None:
                followed += 1
                if target.startswith('/') or followed > MAX_LINKS:
                    return None
                path.pop()
                parts += target.split('/')[::-1]
    return '/'.join(path)


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
