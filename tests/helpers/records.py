"""The scripts that keep and show records, and the machine of made-up records."""
from __future__ import annotations

import importlib.util

from helpers import ROOT

MACHINE = {'cpu': 'A CPU', 'cores': 2, 'python': '3.11.1', 'torch': '2.11.0', 'commit': 'abc1234'}


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / f'maintenance/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
