"""Scripts of this repository as modules."""
from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

from helpers import ROOT


def load_script(name: str):
    """Loaded anew at each call; `load_tool` keeps what it has loaded."""
    spec = importlib.util.spec_from_file_location(f'tool_{Path(name).name}', ROOT / f'{name}.py')
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


load_tool = functools.cache(load_script)
