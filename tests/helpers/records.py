"""The machine of made-up records."""
from __future__ import annotations

MACHINE = {'cpu': 'A CPU', 'cores': 2, 'python': '3.11.1', 'torch': '2.11.0', 'commit': 'abc1234'}
