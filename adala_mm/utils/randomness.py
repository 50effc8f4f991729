"""Random numbers as a function of where they are used, not of what was drawn before."""
from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seeds Python, NumPy and PyTorch (CPU and, once they are in use, GPUs) from a tuple of integers >= 0.

    Nearby keys give unrelated streams (NumPy's ``SeedSequence``).
    """
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words[:2].tobytes())
    np.random.seed(words[:2])
    torch.manual_seed(int(words[2:].view(np.uint64)[0]))
