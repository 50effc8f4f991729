"""Jobs that are timed side by side."""
from __future__ import annotations

from adala_mm.utils.side_by_side import side_by_side
from helpers.processes import dies_at_two


def test_process_that_dies_is_a_row():
    rows = list(side_by_side(dies_at_two, [dict(n=1), dict(n=2)], 2))
    assert dict(n=2, note='failed: BrokenProcessPool') in rows and len(rows) == 2
