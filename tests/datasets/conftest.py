"""What tests of data sets share."""
from __future__ import annotations

import logging

import pytest

from adala_mm.datasets import image_index


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """What the data set warned of."""
    lines: list[str] = []

    def print_log(message: str, logger: object = None, level: int = logging.INFO) -> None:
        if level >= logging.WARNING:
            lines.append(message)
    monkeypatch.setattr(image_index, 'print_log', print_log)
    return lines
