"""What is exported."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adala_mm import export
from helpers import LINEAR, tiny_vit
from helpers.exporting import SEGMENTOR, awake, config


@pytest.fixture
def trained(tmp_path) -> tuple[Path, Path]:
    """Config and checkpoint of a tiny linear segmentor."""
    cfg = config(tiny_vit(attention=LINEAR), **SEGMENTOR)
    cfg.dump(tmp_path / 'config.py')
    torch.save(dict(state_dict=awake(export.assemble(cfg, 'model')).model.state_dict()), tmp_path / 'weights.pth')
    return tmp_path / 'config.py', tmp_path / 'weights.pth'
