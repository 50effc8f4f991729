"""Data sets of a few generated pictures, in the folders of the real ones."""
from __future__ import annotations

import itertools
import os
from pathlib import Path

import cv2
import numpy as np

NUMBER = itertools.count()


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array)
    return path


def photo(path: Path, height: int = 80, width: int = 100) -> Path:
    """A colourful picture that no other call makes."""
    rng = np.random.default_rng(next(NUMBER))
    small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return write(path, cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))


def labels(path: Path, values: range | list, height: int = 80, width: int = 100) -> Path:
    """A label map of 5 x 6 rectangles with every one of the first 30 ``values``."""
    small = np.resize(np.array(list(values)[:30], dtype=np.uint8), (5, 6))
    return write(path, cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST))


def ade20k(root: Path, train: int = 4, val: int = 2) -> Path:
    folder = root / 'ade/ADEChallengeData2016'
    for split, count in (('training', train), ('validation', val)):
        for i in range(count):
            name, size = f'ADE_{split[:-3]}_{i:08d}', (80, 100 + 20 * i)
            photo(folder / 'images' / split / f'{name}.jpg', *size)
            labels(folder / 'annotations' / split / f'{name}.png', range(20 * i, 151), *size)
    return root


def cityscapes(root: Path) -> Path:
    for split, city, count in (('train', 'aachen', 2), ('train', 'ulm', 2), ('val', 'munster', 1)):
        for i in range(count):
            name = f'{city}_{i:06d}_000019'
            photo(root / 'cityscapes/leftImg8bit' / split / city / f'{name}_leftImg8bit.png', 64, 128)
            labels(root / 'cityscapes/gtFine' / split / city / f'{name}_gtFine_labelTrainIds.png', [*range(19), 255],
                   64, 128)
    return root


def coco(root: Path) -> Path:
    for i in range(4):
        photo(root / 'coco/train2017' / f'{i:012d}.jpg', 80 + 8 * i)
    return root


def imagenet22k(root: Path) -> Path:
    for i, wnid in enumerate(('n00004475', 'n00005787')):
        photo(root / 'imagenet22k' / wnid / f'{wnid}_{i}.JPEG')
    return root


def imagenet(root: Path, classes: int = 1000) -> Path:
    """As many folders as classes, which is how mmpretrain counts them; their pictures are links to one."""
    for split in ('train', 'val'):
        first = photo(root / 'imagenet' / split / 'n00000000/n00000000_0.JPEG')
        for i in range(1, classes):
            folder = root / 'imagenet' / split / f'n{i:08d}'
            folder.mkdir()
            os.link(first, folder / f'n{i:08d}_0.JPEG')
    return root
