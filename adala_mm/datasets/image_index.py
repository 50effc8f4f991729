"""Where the images of a data set are: found once, kept as a text file, and shared by all processes of a machine.

An index is a line per image, in the order of the samples. The file starts with a line of JSON that says what it was
made from; it is good for as long as none of that has changed.
"""
from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed
from mmengine.dist import get_world_size, is_main_process
from mmengine.logging import print_log

from adala_mm.datasets.tar_shards import expand_shards, has_wildcards, scan_shard

VERSION = 2
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
    origins: list[str]  # files and folders whose change makes the list obsolete
    problems: list[str]  # that do not stop a run, but cost images


def load_index(source: Source, index_dir: str | None) -> Index:
    """The index of a data set.

    With ``index_dir`` the lines are a memory-mapped file in it, written by the main process the first time and
    whenever folder, list or shards have changed since; else every process lists for itself and keeps it in memory.

    Raises:
        FileNotFoundError: if folder, list, shards or listed images are not there.
        ValueError: if there are no images, or a shard is compressed or no tar file.
    """
    if index_dir is None:
        found = find(source)
        report(found.problems)
        return index_of(np.frombuffer(encode(found.lines), np.uint8), found.problems)
    key = hashlib.sha256(json.dumps([os.path.abspath(source.root), *source[1:]]).encode()).hexdigest()[:12]
    path = Path(index_dir) / f'{Path(source.root).absolute().name}-{key}.txt'
    if get_world_size() > 1:
        # A group of its own: listing may take longer than the training's processes wait for each other.
        group = torch.distributed.new_group(backend='gloo', timeout=timedelta(days=1))
        if is_main_process():
            read_or_write(path, source)
        torch.distributed.barrier(group)
    return read_or_write(path, source)


def find(source: Source) -> Found:
    """Lists the images afresh."""
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
    print_log(f'{len(found.lines):,} images listed in {time.perf_counter() - start:.0f} s', logger='current')
    return found


def is_image(name: str, extensions: tuple[str, ...]) -> bool:
    """By its name; hidden files, such as a Mac's ._photo.jpg, are none."""
    return name.lower().endswith(extensions) and not os.path.basename(name).startswith('.')


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
    lines, folders, others = [], [], Counter()
    for folder, _, files in os.walk(source.root, onerror=refuse, followlinks=True):
        place = os.path.relpath(folder, source.root)
        folders.append(place)
        for name in files:
            if is_image(name, source.extensions):
                lines.append(name if place == '.' else os.path.join(place, name))
            elif is_image(name, OTHERS):
                others[kind_of(name)] += 1
    return Found(sorted(lines), folders, passed_over(source.root, others))


def refuse(error: OSError) -> None:
    """A folder that may not be read must not just be missing from the list."""
    raise error


def list_file(source: Source) -> Found:
    if not os.path.isfile(source.ann_file):
        raise FileNotFoundError(f'no list of images at {source.ann_file}')
    with open(source.ann_file, encoding='utf-8', errors='surrogateescape') as file:
        lines = [line.strip() for line in file]
    lines = [line for line in lines if line and not line.startswith('#')]
    for line in lines[::-(-len(lines) // LOOKED_UP) or 1]:
        if not os.path.isfile(os.path.join(source.root, line)):
            raise FileNotFoundError(
                f'{source.ann_file} names {line!r}, but there is no such file in {source.root or "."}. A list has one '
                'path a line, relative to data_root and data_prefix, and no labels')
    return Found(lines, [os.path.abspath(source.ann_file)], [])


def list_shards(source: Source) -> Found:
    shards = expand_shards(source.root, source.shards)
    lines, problems, others = [], [], Counter()
    for shard in shards:
        for name, address in scan_shard(source.root, shard):
            if not name and address is not None:
                problems.append(f'{os.path.join(source.root, shard)} {address}: images after that are lost. Fetch it '
                                'again')
            elif is_image(name, source.extensions):
                lines.append(address)
            elif is_image(name, OTHERS):
                others[kind_of(name)] += 1
    problems += passed_over(os.path.join(source.root, source.shards), others)
    folders = {'.', *(os.path.dirname(shard) or '.' for shard in shards)} if has_wildcards(source.shards) else ()
    return Found(lines, [*shards, *sorted(folders)], problems)  # a new shard may match


def report(problems: list[str]) -> None:
    for problem in problems:
        print_log(problem, logger='current', level=logging.WARNING)


def encode(lines: list[str]) -> bytes:
    return os.fsencode('\n'.join(lines) + '\n')


def index_of(lines: np.ndarray, problems: list[str]) -> Index:
    return Index(lines, np.flatnonzero(lines == ord('\n')) + 1, problems)


def stamps(root: str, origins: list[str]) -> Iterator[list[int]]:
    """When each file or folder was last changed, and its size."""
    for origin in origins:
        facts = os.stat(os.path.join(root, origin))
        yield [facts.st_mtime_ns, facts.st_size]


def read_or_write(path: Path, source: Source) -> Index:
    index = read_index(path, source.root)
    if index is None:
        write_index(path, source)
        index = read_index(path, source.root)
        if index is None:
            raise ValueError(f'the images of {source.root} change while they are being listed. Wait until they are '
                             'all in place')
    return index


def read_index(path: Path, root: str) -> Index | None:
    """An index that was written before; None if there is none, or it no longer says how things are."""
    try:
        with open(path, 'rb') as file:
            head = json.loads(file.readline())
            start = file.tell()
        if head['version'] != VERSION or head['stamps'] != list(stamps(root, head['origins'])):
            return None
    except (OSError, ValueError, KeyError, TypeError):  # absent, torn, of another kind, or an origin is gone
        return None
    if path.stat().st_size != start + head['bytes']:
        return None
    report(head['problems'])
    return index_of(np.memmap(path, np.uint8, 'r', offset=start), head['problems'])


def write_index(path: Path, source: Source) -> None:
    found = find(source)
    content = encode(found.lines)
    head = dict(version=VERSION, images=len(found.lines), bytes=len(content), problems=found.problems,
                origins=found.origins, stamps=list(stamps(source.root, found.origins)))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.{uuid.uuid4().hex}')  # two runs may list the same images at a time
    try:
        with open(part, 'wb') as file:
            file.write(json.dumps(head).encode() + b'\n')
            file.write(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
