"""How findings are written."""
from __future__ import annotations

import io
import os
from collections.abc import Iterator

from adala_mm.preflight import ERROR, OK, SKIPPED, Finding, write_finding
from adala_mm.preflight.report import Skipped, findings_of


def test_a_check_that_fails_is_a_finding():
    def broken() -> Iterator[Finding]:
        yield Finding('a', OK, 'b')
        raise KeyError('unexpected')

    def impossible() -> Iterator[Finding]:
        raise Skipped('no data')
        yield

    assert [f.status for f in findings_of('a', broken)] == [OK, ERROR]
    assert list(findings_of('a', broken))[1].found == "KeyError: 'unexpected'"
    assert list(findings_of('a', impossible)) == [Finding('a', SKIPPED, 'no data')]


def test_colour_only_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    finding = Finding('disk', ERROR, 'full', 'empty it')
    plain, terminal = io.StringIO(), Terminal()
    write_finding(finding, plain)
    write_finding(finding, terminal)
    assert plain.getvalue() == 'error   disk: full\n        -> empty it\n'
    assert terminal.getvalue().startswith('\033[31merror')


def test_findings_with_names_that_are_no_utf8():
    out = io.TextIOWrapper(io.BytesIO(), 'utf-8')
    write_finding(Finding('images', ERROR, os.fsdecode(b'\xff.jpg')), out)
    assert out.buffer.getvalue() == b'error   images: \\udcff.jpg\n'
