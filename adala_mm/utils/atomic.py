"""Files appear whole or not at all: written under another name, then renamed."""
from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path

PART = '.part'  # what a file is called until it is whole


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes ``content`` to ``path``; a reader, a crash or a full disk never sees a part of it under that name.

    Raises:
        OSError: if the disk is full, with the space needed and left; what was at ``path`` before is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # /dev/null is no file to be replaced
        path.write_bytes(content)
        return
    # MMEngine writes some files on every process, at the same time: each under a name of its own.
    part = path.with_name(f'{secrets.token_hex(4)}_{path.name}{PART}')
    try:
        with open(part, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = f'the {path.name} that was there is' if path.exists() else 'earlier files are'
        raise OSError(error.errno, f'no space for {path}: it needs {len(content) / 2**20:.1f} MiB, '
                      f'{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB are free; {kept} untouched. Make room, '
                      'then continue with --resume') from error


def use_atomic_saving() -> None:
    """Makes MMEngine write checkpoints and other local files with `write_atomically`.

    Called by `adala_mm.openmmlab`.
    """
    from mmengine.fileio import LocalBackend  # here: benchmarks write files too, and need torch alone

    def put(self: LocalBackend, obj: bytes, filepath: str | Path) -> None:
        write_atomically(filepath, obj)

    def put_text(self: LocalBackend, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        write_atomically(filepath, obj.encode(encoding))

    LocalBackend.put, LocalBackend.put_text = put, put_text
