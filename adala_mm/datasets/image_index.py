"""Where the images of a data set are: found once, kept as a text file, and shared by all processes of a machine.

An index is a line per image, in the order of the samples. The file starts with a line of JSON that says what it was
made from; it is good for as long as none of that has changed.
"""
from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
import time
import uuid
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch.distributed
from mmengine.dist import get_world_size, is_main_process
from mmengine.logging import print_log

from adala_mm.datasets.tar_shards import expand_shards, has_wildcards, parents, scan_shard
from adala_mm.utils.folders import is_hidden, stamp_of, walk

VERSION = 3
TICK = 2 * 10 ** 9  # ns: two changes of a file that are nearer in time may have the same stamp (FAT's clock)
LOOKED_UP = 1000  # lines of a file list whose files are looked for, spread over the list
OTHERS = ('.avif', '.bmp', '.cr2', '.dcm', '.dng', '.exr', '.gif', '.hdr', '.heic', '.heif', '.j2k', '.jfif', '.jp2',
          '.jpe', '.jpeg', '.jpg', '.jxl', '.nef', '.pbm', '.pgm', '.png', '.pnm', '.ppm', '.psd', '.tga', '.tif',
          '.tiff', '.webp')  # of files that are images as well; a data set does not take them all


class Source(NamedTuple):
    """What images to list: a file list, tar shards, or, with neither, a folder and all folders in it."""

    root: str
    ann_file: str
    shards: str
    extensions: tuple[str, ...]


class Index(NamedTuple):
    """All images of a data set."""

    lines: np.ndarray  # uint8: all lines, each ending in a newline
    ends: np.ndarray  # (N,) int64: where the line after each one starts
    problems: list[str]  # as in `Found`


class Found(NamedTuple):
    lines: list[str]  # paths relative to the root; of a file in a shard, shard?offset+size#name
    origins: dict[str, list[int]]  # files and folders whose change makes the list obsolete, stamped before the look
    problems: list[str]  # that do not stop a run, but cost images


def load_index(source: Source, index_dir: str | None) -> Index:
    """The index of a data set.

    With ``index_dir`` the lines are a memory-mapped file in it, written by the main process the first time and
    whenever folder, list or shards have changed since; else every process lists for itself and keeps it in memory.

    Raises:
        FileNotFoundError: if folder, list, shards or listed images are not there.
        ValueError: if there are no images, or a shard is compressed or no tar file; if something changes while it is
            being listed, or processes find other images.
    """
    if get_world_size() == 1:
        return list_anew(source) if index_dir is None else read_or_write(index_path(source, index_dir), source)
    # A group of its own: listing may take longer than the training's processes wait for each other.
    group = torch.distributed.new_group(backend='gloo', timeout=timedelta(days=1))
    if index_dir is None:
        index = list_anew(source)
    else:
        path = index_path(source, index_dir)
        if is_main_process():
            read_or_write(path, source)
        torch.distributed.barrier(group)
        index = read_or_write(path, source, young=True)
    seen = [''] * get_world_size()
    torch.distributed.all_gather_object(seen, hashlib.sha256(index.lines).hexdigest(), group)
    if other := [rank for rank, digest in enumerate(seen) if digest != seen[0]]:
        raise ValueError(f'processes {", ".join(map(str, other))} list other images of {source.root} than process 0: '
                         'give all machines the same files, and wait until they are all in place')
    return index


def list_anew(source: Source) -> Index:
    found = find(source)
    report(found.problems)
    return index_of(np.frombuffer(encode(found.lines), np.uint8), found.problems)


def index_path(source: Source, index_dir: str) -> Path:
    """The file that keeps the index of a data set."""
    key = [os.path.abspath(source.root), source.ann_file and os.path.abspath(source.ann_file), *source[2:]]
    name = Path(source.root).absolute().name[:40]  # readable, and short enough for any file system
    return Path(index_dir) / f'{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.txt'


def find(source: Source) -> Found:
    """Lists the images afresh.

    Raises:
        ValueError: as `load_index`.
    """
    what = source.ann_file or (os.path.join(source.root, source.shards) if source.shards else source.root)
    print_log(f'Listing the images of {what}', logger='current')
    start = time.perf_counter()
    found = (list_file if source.ann_file else list_shards if source.shards else list_folder)(source)
    if not found.lines:
        raise ValueError(f'{what} has no images' + (
            '' if source.ann_file else '. '.join([f': no file in it ends in {", ".join(source.extensions)}',
                                                  *found.problems])))
    odd = next((line for line in found.lines if '\n' in line), None)
    if odd is not None:
        raise ValueError(f'the file name {odd!r} has a line break in it: rename the file')
    if changed := changed_origin(source.root, found.origins):
        raise unsettled(source.root, changed)
    print_log(f'{len(found.lines):,} images listed in {time.perf_counter() - start:.0f} s', logger='current')
    return found


def is_image(path: str, extensions: tuple[str, ...]) -> bool:
    """By its name; what is hidden is none."""
    return path.lower().endswith(extensions) and not is_hidden(path)


TAKE = 'if they are meant, convert them, or name their suffix in the data set (`extensions`, `img_suffix`)'


def passed_over(root: str, kinds: Counter[str]) -> list[str]:
    """What to say of files that look like images, but are not taken: ``kinds`` counts them by their suffix."""
    found = ', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())
    return [f'{root} has files that look like images and are not taken, {found}: {TAKE}'] if kinds else []


def kind_of(name: str) -> str:
    """Its suffix."""
    return os.path.splitext(name)[1].lower()


def list_folder(source: Source) -> Found:
    if not os.path.isdir(source.root):
        raise FileNotFoundError(f'no folder of images at {source.root}')
    lines, origins, dead, others = [], {}, [], Counter()
    for place, stamp, files, links in walk(source.root):
        origins[place] = stamp
        for name in files:
            if is_image(name, source.extensions):
                lines.append(os.path.join(place, name))
            elif is_image(name, OTHERS):
                others[kind_of(name)] += 1
        dead += [os.path.join(place, name) for name in links]
    return Found(sorted(lines), origins, [*dead_links(source.root, dead), *passed_over(source.root, others)])


def dead_links(root: str, names: list[str]) -> list[str]:
    """What to say of links that lead to no file and no folder."""
    return [f'{root} has {len(names):,} links that lead nowhere, the first being {min(names)!r}: what they stand for '
            'is lost. Put it there, or remove them'] if names else []


def list_file(source: Source) -> Found:
    if not os.path.isfile(source.ann_file):
        raise FileNotFoundError(f'no list of images at {source.ann_file}')
    stamp = stamp_of(source.ann_file)
    content = Path(source.ann_file).read_bytes().removeprefix(codecs.BOM_UTF8)
    if b'\0' in content:
        raise ValueError(f'{source.ann_file} has bytes that no path has: save it as plain text in UTF-8, not in UTF-16')
    lines = [os.fsdecode(line) for line in (line.strip(b' \t\r') for line in content.split(b'\n'))
             if line and not line.startswith(b'#')]
    for line in lines[::-(-len(lines) // LOOKED_UP) or 1]:
        if not os.path.isfile(os.path.join(source.root, line)):
            raise FileNotFoundError(
                f'{source.ann_file} names {line!r}, but there is no such file in {source.root or "."}. A list has one '
                'path a line, relative to data_root and data_prefix, and no labels')
    return Found(lines, {os.path.abspath(source.ann_file): stamp}, [])


def list_shards(source: Source) -> Found:
    shards, origins = expand_shards(source.root, source.shards), {}
    if has_wildcards(source.shards):  # a new shard may match
        origins |= {place: stamp_of(os.path.join(source.root, place)) for shard in shards for place in parents(shard)}
        if expand_shards(source.root, source.shards) != shards:
            raise unsettled(source.root, source.shards)
    lines, problems, others = [], [], Counter()
    for shard in shards:
        path = os.path.join(source.root, shard)
        origins[shard] = stamp_of(path)
        files, again, lost, dead, problem = scan_shard(source.root, shard)
        for name, address in files.items():
            if is_image(name, source.extensions):
                lines.append(address)
            elif is_image(name, OTHERS):
                others[kind_of(name)] += 1
        if repeated := [name for name in again if is_image(name, source.extensions)]:
            problems.append(f'{path} has {len(repeated):,} images more than once under one name, the first being '
                            f'{repeated[0]!r}: the last one counts, as when it is unpacked')
        if unread := [name for name in lost if is_image(name, source.extensions)]:
            problems.append(f'{path} has {len(unread):,} images that are sparse, or links to what is not in it, the '
                            f'first being {unread[0]!r}: they are lost. Write it again with neither')
        problems += dead_links(path, [name for name in dead if not is_hidden(name)])
        if problem:
            problems.append(f'{path} {problem}: images after that are lost. Fetch it again')
    problems += passed_over(os.path.join(source.root, source.shards), others)
    return Found(lines, origins, problems)


def report(problems: list[str]) -> None:
    for problem in problems:
        print_log(problem, logger='current', level=logging.WARNING)


def encode(lines: list[str]) -> bytes:
    return os.fsencode('\n'.join(lines) + '\n')


def index_of(lines: np.ndarray, problems: list[str]) -> Index:
    return Index(lines, np.flatnonzero(lines == ord('\n')) + 1, problems)


def changed_origin(root: str, origins: dict[str, list[int]]) -> str | None:
    """The first file or folder that is not as it was when it was stamped; None if all are."""
    for origin, stamp in origins.items():
        path = os.path.join(root, origin)
        try:
            if stamp_of(path) != stamp:
                return path
        except FileNotFoundError:
            return path
    return None


def unsettled(root: str, changed: str) -> ValueError:
    return ValueError(f'{changed} has changed while the images of {root} were being listed. Wait until they are all in '
                      'place, and keep what runs write (work_dir, index_dir) out of there')


def read_or_write(path: Path, source: Source, young: bool = False) -> Index:
    index = read_index(path, source.root, young)
    return write_index(path, source) if index is None else index


def read_index(path: Path, root: str, young: bool = False) -> Index | None:
    """An index that was written before; None if there is none, or it may no longer say how things are.

    Args:
        young: also one of files that had been changed a moment before they were listed. A change in the same moment
            after that has left no trace, so that such an index is good for the run that made it only.
    """
    try:
        with open(path, 'rb') as file:
            head = json.loads(file.readline())
            if (head['version'] != VERSION or (head['young'] and not young) or changed_origin(root, head['origins'])
                    or os.fstat(file.fileno()).st_size != file.tell() + head['bytes']):
                return None
            return mapped(file, file.tell(), head['problems'])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, torn, of another kind
        return None


def write_index(path: Path, source: Source) -> Index:
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = time.time_ns()
    found = find(source)
    content = encode(found.lines)
    young = any(max(stamp[:2]) > begun - TICK for stamp in found.origins.values())
    head = dict(version=VERSION, images=len(found.lines), bytes=len(content), problems=found.problems, young=young,
                origins=found.origins)
    part = path.with_name(f'{path.name}.{uuid.uuid4().hex}')  # two runs may list the same images at a time
    try:
        with open(part, 'w+b') as file:
            file.write(json.dumps(head).encode() + b'\n')
            start = file.tell()
            file.write(content)
            file.flush()
            part.replace(path)
            if changed := changed_origin(source.root, found.origins):  # by the index, if that lies in the folder
                raise unsettled(source.root, changed)
            return mapped(file, start, found.problems)
    finally:
        part.unlink(missing_ok=True)


def mapped(file: BinaryIO, start: int, problems: list[str]) -> Index:
    """The index whose lines begin at ``start`` of a file."""
    report(problems)
    return index_of(np.memmap(file, np.uint8, 'r', offset=start), problems)
