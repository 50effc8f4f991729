"""What tests of hooks share."""
from __future__ import annotations

import pytest

from helpers.segmentors import SEGMENTOR, build


@pytest.fixture(scope='module')
def segmentor():
    return build(SEGMENTOR)
