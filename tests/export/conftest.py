"""What is exported."""
from __future__ import annotations

from pathlib import Path

import pytest

from helpers.exporting import write_segmentor


@pytest.fixture
def trained(tmp_path) -> tuple[Path, Path]:
    return write_segmentor(tmp_path)
