"""Rectangles and discs in COCO's format."""
from __future__ import annotations

import json
from pathlib import Path

import cv2
import mmdet
import numpy as np
from mmengine.config import Config

CLASSES = ('person', 'dog')  # rectangles and discs under names that COCO knows


def mmdets(path: str) -> Config:
    return Config.fromfile(Path(mmdet.__file__).parent / '.mim/configs' / path)


def draw_split(root: Path, split: str, count: int, seed: int) -> None:
    """Images of 96 x 64 and 64 x 96 pixels with two objects each, and their boxes and outlines in COCO's format."""
    rng = np.random.default_rng(seed)
    images, objects = [], []
    (root / split).mkdir(parents=True)
    for i in range(1, count + 1):
        height, width = (64, 96) if i % 2 else (96, 64)
        picture = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
        for half in range(2):
            side, kind = int(rng.integers(16, 26)), int(rng.integers(2))
            x, y = int(rng.integers(width - 26)), half * height // 2 + int(rng.integers(height // 2 - 26))
            if kind == 0:
                cv2.rectangle(picture, (x, y), (x + side - 1, y + side - 1), (40, 40, 220), -1)
                outline = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
            else:
                cv2.circle(picture, (x + side // 2, y + side // 2), side // 2, (220, 60, 40), -1)
                turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
                outline = 0.5 + 0.5 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
            outline = outline * side + [x, y]
            objects.append(dict(id=len(objects) + 1, image_id=i, category_id=kind + 1, bbox=[x, y, side, side],
                                area=side ** 2, iscrowd=0, segmentation=[outline.ravel().tolist()]))
        cv2.imwrite(str(root / split / f'{i}.png'), picture)
        images.append(dict(id=i, file_name=f'{i}.png', height=height, width=width))
    path = root / f'annotations/instances_{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(images=images, annotations=objects, categories=[
        dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)])))
