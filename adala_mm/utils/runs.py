"""Several runs at a time: who may work in a folder."""
from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int]:
    """Holds the lock of a file, for this process and those that inherit the descriptor which this yields.

    Raises:
        RuntimeError: without ``wait``, if somebody else holds it.
    """
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RuntimeError(f'{path.parent}: another process trains this run; wait for it, or end it') from None
        yield file.fileno()
