"""Photographs without labels in a folder, a list of files, and tar shards; and files that are none."""
from __future__ import annotations

import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset

from adala_mm.datasets import ImageFiles
from adala_mm.registry import DATASETS

KINDS = {'folder': {}, 'list': dict(ann_file='list.txt'), 'shards': dict(shards='part-{000..001}.tar')}
PIPELINE = [dict(type='LoadImageFromFile'), dict(type='mmpretrain.RandomFlip', prob=0.5),
            dict(type='mmpretrain.PackInputs')]
NAMES = ['a/00.jpg', 'a/01.JPEG', 'a/02.jpg', 'a/b/03.jpg', 'c/04.jpg', 'c/05.png']
of_each_kind = pytest.mark.parametrize('kind', KINDS)


def encoded(i: int, suffix: str = '.jpg') -> bytes:
    small = np.random.default_rng(i).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return cv2.imencode(suffix, cv2.resize(small, (48 + i, 40), interpolation=cv2.INTER_CUBIC))[1].tobytes()


def lay_out(root: Path, contents: dict[str, bytes] | None = None) -> Path:
    """The same files in all three ways, beside files that are no images."""
    contents = contents or {name: encoded(i, Path(name).suffix) for i, name in enumerate(NAMES)}
    for name, content in contents.items():
        path = root / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        (path.parent / 'notes.txt').write_text('no image')
        (path.parent / '._00.jpg').write_bytes(b'a Mac leaves these')
    (root / 'list.txt').write_text('# the images\n\n' + '\n'.join(contents) + '\r\n')
    with webdataset.ShardWriter(str(root / 'images/part-%03d.tar'), maxcount=3, verbose=0) as writer:
        for name, content in contents.items():
            key, suffix = name.rsplit('.', 1)
            writer.write({'__key__': key, suffix: content, 'cls': '7', 'txt': 'a caption'})
    return root


def build(root: Path, kind: str, **options) -> ImageFiles:
    return DATASETS.build(dict(dict(type='adala_mm.ImageFiles', data_root=str(root), data_prefix='images',
                                    pipeline=PIPELINE, **KINDS[kind]), **options))


def name_of(path: str) -> str:
    """Of an image, wherever it lies."""
    return path.split('#')[-1].split('/images/')[-1]


def draw(dataset: ImageFiles, i: int) -> dict:
    random.seed(i), np.random.seed(i)
    return dataset[i]


GOOD = encoded(0)
SPOILT = {'truncated': GOOD[:len(GOOD) // 2], 'no bytes': b'', 'no image': b'<html>404 Not Found</html>'}


def spoilt(root: Path, content: bytes, *places: int) -> Path:
    """As `lay_out`, with ``content`` in these places; PNGs are left out, so that all are JPEGs."""
    return lay_out(root, {f'{i}.jpg': content if i in places else encoded(i) for i in range(6)})
