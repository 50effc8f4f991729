"""What tests of configs share."""
from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    # Three log lines for each of up to 640 parameters take longer than the construction that they describe.
    monkeypatch.setattr('mmengine.optim.optimizer.default_constructor.print_log', lambda *args, **kwargs: None)
