"""The embedded data set: procedurally drawn scenes whose labels need texture, and context from across the image."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmseg.datasets import BaseSegDataset
from PIL import Image

from adala_mm.registry import DATASETS

CLASSES = ('ground', 'stripes', 'checks', 'beacon', 'friend', 'stranger')
PALETTE = [[120, 120, 120], [230, 160, 40], [60, 160, 220], [250, 250, 90], [60, 190, 90], [220, 60, 80]]
WARM = np.array([[0.85, 0.2, 0.2], [0.85, 0.75, 0.2]])
COOL = np.array([[0.2, 0.75, 0.3], [0.25, 0.35, 0.9]])
SIDE = 80  # pixels
SPLITS = {'train': 1000, 'val': 100}  # images
RECIPE = dict(version=1, side=SIDE, seed=2024, splits=SPLITS)  # what a folder must have been written with


def draw_scene(rng: np.random.Generator, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """One scene.

    On cloudy ground lie patches of stripes and of checks, drawn in the ground's own two tones, so that only texture
    tells them apart. A framed beacon shows a warm or a cool hue: under a warm one all discs of the scene are friends,
    under a cool one strangers, whatever their own hue and however far away. No local look can tell. Specks and
    scratches clutter everything and change no label.

    Returns:
        image (side, side, 3) uint8 RGB, labels (side, side) uint8 indexing ``CLASSES``.
    """
    y, x = np.mgrid[:side, :side].astype(np.float32)
    tones = rng.uniform(0.25, 0.6, 3) + np.array([-0.09, 0.09])[:, None]  # dark and light tone of this image
    cloud = _cloud(rng, side)[..., None]
    image = tones[0] * (1 - cloud) + tones[1] * cloud
    label = np.zeros((side, side), np.uint8)

    for _ in range(rng.integers(2, 5)):
        shape = _blob(rng, x, y, side)
        kind = int(rng.integers(1, 3))
        period, angle, phase = rng.uniform(5, 8), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2)
        u = np.sin(2 * np.pi / period * (x * np.cos(angle) + y * np.sin(angle)) + phase[0])
        v = np.sin(2 * np.pi / period * (y * np.cos(angle) - x * np.sin(angle)) + phase[1])
        pattern = (u if kind == 1 else u * v) > 0
        image[shape] = tones[pattern[shape].astype(int)]
        label[shape] = kind

    warm = rng.random() < 0.5
    size = side / 7
    (cy, cx), *discs = _free_spots(rng, side, count=int(rng.integers(3, 6)), gap=side / 4)
    frame = np.maximum(abs(x - cx), abs(y - cy)) <= size / 2 + 2
    inner = np.maximum(abs(x - cx), abs(y - cy)) <= size / 2 - 1
    image[frame], image[inner], label[frame] = 0.95, rng.choice(WARM if warm else COOL), 3
    for cy, cx in discs:
        disc = ((x - cx) ** 2 + (y - cy) ** 2 <= rng.uniform(side / 12, side / 8) ** 2) & ~frame
        image[disc], label[disc] = rng.choice(np.concatenate([WARM, COOL])), 4 if warm else 5

    for _ in range(10):  # clutter: specks and scratches
        cy, cx, radius = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.7, 1.8)
        length, angle = (0, 0) if rng.random() < 0.5 else (rng.uniform(4, 12), rng.uniform(0, np.pi))
        along = np.clip((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle), -length, length)
        near = (x - cx - along * np.cos(angle)) ** 2 + (y - cy - along * np.sin(angle)) ** 2 < radius ** 2
        image[near] = rng.uniform(0, 1, 3)
    image = image * rng.uniform(0.8, 1.2) + rng.normal(0, 0.04, image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8), label


def _cloud(rng: np.random.Generator, side: int) -> np.ndarray:
    """Smooth noise in [0, 1]: small random grids of three sizes, enlarged and added."""
    total = np.zeros((side, side), np.float32)
    for cells in (4, 9, 20):
        grid = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        total += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))
    return np.clip(total / 3, 0, 1)


def _blob(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    """A wobbly disc, as a mask."""
    cy, cx, radius = rng.uniform(0, side, 2).tolist() + [rng.uniform(side / 7, side / 3.5)]
    angle = np.arctan2(y - cy, x - cx)
    wobble = sum(rng.uniform(-0.15, 0.15) * np.sin(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    return np.hypot(x - cx, y - cy) < radius * (1 + wobble)


def _free_spots(rng: np.random.Generator, side: int, count: int, gap: float) -> list[tuple[float, float]]:
    """``count`` places at least ``gap`` apart; fewer only if there is no room left."""
    spots: list[tuple[float, float]] = []
    for _ in range(200):
        spot = tuple(rng.uniform(side / 9, side * 8 / 9, 2))
        if all(np.hypot(spot[0] - s[0], spot[1] - s[1]) >= gap for s in spots):
            spots.append(spot)
        if len(spots) == count:
            break
    return spots


def write_scenes(root: str | Path) -> None:
    """Draws the data set into ``root``: images/{train,val}/*.png, labels/{train,val}/*.png, recipe.json.

    It is written beside its place and renamed when complete, so an interrupted run leaves no half data set.
    """
    root = Path(root)
    part = root.with_name(f'{root.name}.partial-{os.getpid()}')
    shutil.rmtree(part, ignore_errors=True)
    for s, (split, count) in enumerate(SPLITS.items()):
        for kind in ('images', 'labels'):
            (part / kind / split).mkdir(parents=True)
        for i in range(count):
            image, label = draw_scene(np.random.default_rng([RECIPE['seed'], s, i]))
            Image.fromarray(image).save(part / 'images' / split / f'{i:04d}.png')
            Image.fromarray(label).save(part / 'labels' / split / f'{i:04d}.png')
    (part / 'recipe.json').write_text(json.dumps(RECIPE))
    try:
        part.rename(root)
    except OSError:  # another process was faster; what it wrote is checked before use
        shutil.rmtree(part)


def check_scenes(root: str | Path) -> None:
    """Raises ValueError, naming what is wrong, unless ``root`` holds a complete data set of this version."""
    root = Path(root)
    fix = f'Remove the folder {root} and run again: it will be drawn anew.'
    try:
        recipe = json.loads((root / 'recipe.json').read_text())
    except (OSError, ValueError):  # absent, unreadable, or not JSON
        raise ValueError(f'{root} exists but is not a complete embedded data set (no readable recipe.json). '
                         f'{fix}') from None
    if recipe != RECIPE:
        raise ValueError(f'{root} was drawn by another recipe ({recipe}, now {RECIPE}). {fix}')
    for split, count in SPLITS.items():
        for kind in ('images', 'labels'):
            found = len(list((root / kind / split).glob('*.png')))
            if found != count:
                raise ValueError(f'{root}/{kind}/{split} has {found} of {count} PNG files. {fix}')


@DATASETS.register_module()
class BeaconsDataset(BaseSegDataset):
    """The embedded segmentation data set; draws itself into ``data_root`` the first time it is asked for.

    Args:
        data_root: folder of the data set; must be absent or complete.
        split: ``train`` (1,000 images) or ``val`` (100), each 80 x 80 pixels.
        kwargs: of mmseg's ``BaseSegDataset`` (``pipeline``, ``indices``, ``lazy_init`` ...).

    Raises:
        ValueError: if ``data_root`` is incomplete, or was drawn by another version.
    """

    METAINFO = dict(classes=CLASSES, palette=PALETTE)

    def __init__(self, data_root: str, split: str, **kwargs) -> None:
        if split not in SPLITS:
            raise ValueError(f'unknown split {split!r}; choose one of {", ".join(SPLITS)}')
        if is_main_process() and not Path(data_root).exists():
            print_log(f'Drawing {sum(SPLITS.values())} scenes into {data_root}', logger='current')
            Path(data_root).absolute().parent.mkdir(parents=True, exist_ok=True)
            write_scenes(data_root)
        barrier()
        check_scenes(data_root)
        super().__init__(data_root=data_root, img_suffix='.png', seg_map_suffix='.png',
                         data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}'), **kwargs)
