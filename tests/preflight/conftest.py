"""Where tools/check.py is run."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adala_mm.preflight import memory
from helpers.pictures import ade20k, coco
from helpers.recipes import apart


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Iterator[Path]:
    # What takes a second in each of many runs; tests that are about it put it back.
    monkeypatch.setattr(memory, 'estimate', lambda plan: lambda batch, height, width: 0)
    monkeypatch.setattr(memory, 'head_line', lambda plan: lambda pixels: 0)
    with apart(tmp_path):
        yield tmp_path


@pytest.fixture
def root(place) -> Path:
    return ade20k(coco(place / 'data'))
