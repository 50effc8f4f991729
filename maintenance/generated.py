"""Files that are written from others: the command line that their writers share."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

Files = Iterable[tuple[str, str]]  # path from the root of the repository, and the text that belongs there


def keep(root: Path, **writers: Callable[[], Files]) -> bool:
    """Writes what differs from the files of ``writers``, or with ``--check`` says all that differs and fails.

    Args:
        writers: by the name of the script that has them.

    Returns:
        Whether it was allowed to write.
    """
    parser = argparse.ArgumentParser(description=f'Writes the files of {", ".join(writers)}.')
    parser.add_argument('--check', action='store_true', help='change nothing; fail if a file is out of date')
    check, outdated = parser.parse_args().check, []
    for script, files in writers.items():
        for name, text in files():
            path = root / name
            if path.exists() and path.read_text(encoding='utf-8') == text:
                continue
            if check:
                outdated.append(f'{name} is out of date; run: python maintenance/{script}.py')
            else:
                path.write_text(text, encoding='utf-8')
                print(f'{name} has been written', flush=True)
    if outdated:
        sys.exit('\n'.join(outdated))
    return not check
