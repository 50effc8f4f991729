"""Folders of files, each looked into once, however many links lead to it."""
from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Folder(NamedTuple):
    place: str  # below the root; '' is the root itself
    stamp: list[int]  # of before it was looked into
    files: list[str]  # their names
    dead: list[str]  # names of links that lead to no file and no folder


def stamp_of(path: str) -> list[int]:
    """When a file or folder was last written, when anything of it last changed, both in ns, and its size in bytes.

    The second is set by the system alone: ``rsync -a`` and ``tar -x`` turn back the first.
    """
    facts = os.stat(path)
    return [facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size]


def is_hidden(path: str) -> bool:
    """Whether a path has a part that begins with a dot, such as a Mac's ``._photo.jpg`` or ``.ipynb_checkpoints``."""
    return any(part.startswith('.') and part not in ('.', '..') for part in path.split('/'))


def walk(root: str) -> Iterator[Folder]:
    """A folder and all that are below it or linked from there, but for hidden ones.

    A folder to which several ways lead is looked into once, so that links in a circle have an end: by its own way if
    that begins at the root, else by the first link, in the order of paths.

    Raises:
        OSError: for a folder that may not be read, which must not just be missing.
    """
    seen, links = set(), ['']
    while links:
        folders = [heapq.heappop(links)]
        while folders:
            place = folders.pop()
            path = os.path.join(root, place)
            if (real := os.path.realpath(path)) in seen:
                continue
            seen.add(real)
            stamp, files, dead = stamp_of(path), [], []
            for entry in os.scandir(path):
                if is_hidden(entry.name):
                    continue
                if leads_to(entry.is_dir):
                    below = os.path.join(place, entry.name)
                    heapq.heappush(links, below) if entry.is_symlink() else folders.append(below)
                elif leads_to(entry.is_file):
                    files.append(entry.name)
                elif entry.is_symlink():
                    dead.append(entry.name)
            yield Folder(place, stamp, files, dead)


def printable(text: str) -> str:
    """A text that any terminal and log takes: bytes of file names that are no UTF-8 are written as ``\\udcff``."""
    return text.encode('utf-8', 'backslashreplace').decode()


def leads_to(kind: Callable[[], bool]) -> bool:
    """Whether a folder's entry is of a kind; a link to itself, or into a folder that may not be read, is of none."""
    try:
        return kind()
    except OSError:
        return False
