"""Class ids of label files as they are written, before a pipeline makes bytes of them."""
from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

BYTES = ('1', 'L', 'P')  # Pillow's modes of one channel and at most 8 bits; of a palette, its indices are the ids
NO_CLASS = 65535  # in 16 bits what 255 is in 8, and its low byte
# Steps of pipelines that keep the low byte of a label. A class derived from them may read a file in its own way.
LOW_BYTE = ('mmseg.datasets.transforms.loading.LoadAnnotations', 'mmcv.transforms.loading.LoadAnnotations')


def leaves(dataset: Any) -> Iterator[Any]:
    """The data sets below wrappers such as RepeatDataset and ConcatDataset."""
    if hasattr(dataset, 'datasets'):
        for part in dataset.datasets:
            yield from leaves(part)
    elif hasattr(dataset, 'dataset'):
        yield from leaves(dataset.dataset)
    else:
        yield dataset


def keeps_low_byte(step: Any) -> bool:
    """Whether a step of a pipeline makes 8 bits of the labels in a file."""
    return f'{type(step).__module__}.{type(step).__qualname__}' in LOW_BYTE


def in_low_bytes(dataset: Any) -> bool:
    """Whether labels of a data set come from its files by a step that keeps their low byte."""
    return any(keeps_low_byte(step) for part in leaves(dataset)
               for step in getattr(getattr(part, 'pipeline', None), 'transforms', []))


def distinct(values: np.ndarray) -> np.ndarray:
    """The values that occur, in order."""
    if values.dtype in (np.uint8, np.uint16):
        return np.flatnonzero(np.bincount(values.ravel()))  # ten times as fast as sorting pixels
    return np.unique(values)


def label_ids(path: str) -> frozenset[int]:
    """Ids that occur in a label file.

    mmseg's ``LoadAnnotations`` keeps the low byte of every value: 300 becomes 44, and 256 becomes 0. So ids are 0 to
    255, of which 255 usually means no class. 65535 stands for 255, which is what the low byte makes of it.

    Raises:
        ValueError: for anything that the low byte changes, and for a picture in colours; the text leaves the path out.
        OSError: if the file is not a whole image.
    """
    with Image.open(path) as image:
        if len(image.getbands()) > 1:
            raise ValueError(f'is a picture in colours ({image.mode}), not a map of class ids')
        values = np.asarray(image)
    found = distinct(values)
    lost = found[~((found >= 0) & (found <= 255) & (found == np.trunc(found)) | (found == NO_CLASS))]
    if lost.size:
        raise ValueError(f'holds the label {lost[0]:g}, but label maps are read as 8 bits: ids are 0 to 254, and 255 '
                         f'(or {NO_CLASS}) is no class')
    return frozenset(found.astype(int).tolist())


@cache
def require_byte_ids(path: str) -> None:
    """Raises ValueError, naming the file, if `label_ids` does; of most files only the header is read, and once.

    What is no file of this machine, or no image that Pillow knows, passes.
    """
    if not Path(path).is_file():
        return
    try:
        with Image.open(path) as image:
            narrow = image.mode in BYTES
        if not narrow:
            label_ids(path)
    except UnidentifiedImageError:
        return
    except ValueError as error:
        raise ValueError(f'{path} {error}') from None
