"""The findings of a check, and how they are printed on a terminal."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from adala_mm.utils.folders import printable

OK, WARNING, ERROR, SKIPPED = 'ok', 'warning', 'error', 'skipped'
COLOURS = {OK: '\033[32m', WARNING: '\033[33m', ERROR: '\033[31m', SKIPPED: '\033[2m'}


class Skipped(Exception):
    """A check cannot be done; the text says why."""


@dataclass(frozen=True)
class Finding:
    """One line of the list.

    Args:
        name: what was looked at.
        status: ``ok``, ``warning`` (training runs, but perhaps not as wanted), ``error`` (it would fail) or
            ``skipped``.
        found: what was found.
        fix: what to do about it; empty if nothing is to be done.
    """

    name: str
    status: str
    found: str
    fix: str = ''


def one_line(error: BaseException) -> str:
    return ' '.join(str(error).split()) or type(error).__name__


def findings_of(name: str, check: Callable[[], Iterator[Finding]],
                fix: str = 'correct what the message names') -> Iterator[Finding]:
    """Yields the findings of ``check``. An error in it becomes a finding, so that all other checks still run."""
    try:
        yield from check()
    except Skipped as reason:
        yield Finding(name, SKIPPED, str(reason))
    except Exception as error:  # whatever goes wrong here would go wrong in training
        kind = '' if isinstance(error, (ValueError, FileNotFoundError)) else f'{type(error).__name__}: '
        yield Finding(name, ERROR, kind + one_line(error), fix)


def write_finding(finding: Finding, out: TextIO = sys.stdout) -> None:
    """Two lines at most: status, name and what was found, then the fix. Coloured on a terminal."""
    colour, end = (COLOURS[finding.status], '\033[0m') if out.isatty() else ('', '')
    print(f'{colour}{finding.status:8}{end}{finding.name}: {printable(finding.found)}', file=out, flush=True)
    if finding.fix:
        print(f'        -> {finding.fix}', file=out, flush=True)
