"""How tests call the analysis tools and read what these wrote."""
from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adala_mm import analysis
from adala_mm.analysis.comparison import Comparison
from adala_mm.analysis.images import named_images
from helpers import ROOT

NORM = dict(type='ImgDataPreprocessor', mean=[110.0, 120.0, 130.0], std=[50.0, 55.0, 60.0], bgr_to_rgb=True)
TOOLS = ROOT / 'tools/analysis_tools'
COUNT = 14


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**dict(data_root=None, cfg_options=None, trust_checkpoint=False, device='cpu') | changes)


def load(world: dict[str, Path], *students: str, teacher: str | None = None, **changes):
    specs = [analysis.Spec.parse(text.format_map(world)) for text in students]
    return analysis.load_networks(teacher and analysis.Spec.parse(teacher.format_map(world)), specs,
                                  arguments(**changes))


def refused(tool, *words: str | Path) -> str:
    with pytest.raises(SystemExit) as info:
        tool(*words)
    assert isinstance(info.value.code, str), 'one message, not a usage error'
    assert '\n' not in info.value.code
    return info.value.code


def pixels(path: Path) -> np.ndarray:
    """Of a picture that is one: not blank."""
    found = np.asarray(Image.open(path).convert('RGB')).astype(float)
    assert min(found.shape[:2]) > 150 and found.std() > 10
    assert (found != found[0, 0]).any(axis=-1).mean() > 0.02
    return found


def hsic_by_definition(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """U-statistic of Gretton et al. 2005: sums over tuples of distinct examples."""
    n = len(k)
    pairs = [k[i, j] * l[i, j] for i, j in itertools.permutations(range(n), 2)]
    threes = [k[i, j] * l[i, q] for i, j, q in itertools.permutations(range(n), 3)]
    fours = [k[i, j] * l[q, r] for i, j, q, r in itertools.permutations(range(n), 4)]
    return np.mean(pairs) - 2 * np.mean(threes) + np.mean(fours)


def batches(world, networks, size: int) -> list[list[torch.Tensor]]:
    images = [analysis.read_image(path, (32, 32)) for path in named_images([str(world['images'])])]
    return [[analysis.normalise(images[i:i + size], n.preprocessor) for n in networks]
            for i in range(0, len(images), size)]


def compared(world, *students: str, size: int = COUNT) -> tuple[dict, list]:
    teacher, own = load(world, *students)
    comparison = Comparison(teacher, own)
    for batch in batches(world, (teacher, *own), size):
        comparison.update(batch)
    return comparison.results([1, 3], 4), [teacher, *own]
