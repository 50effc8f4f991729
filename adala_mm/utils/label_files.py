"""Class ids of label files as they are written, before a pipeline makes bytes of them."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

BYTES = ('1', 'L', 'P')  # Pillow's modes of one channel and at most 8 bits; of a palette, its indices are the ids
NO_CLASS = 65535  # in 16 bits what 255 is in 8, and its low byte


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
    if values.dtype == np.uint8:
        return frozenset(np.flatnonzero(np.bincount(values.ravel())).tolist())  # ten times as fast as sorting pixels
    found = np.unique(values)
    lost = found[~((found >= 0) & (found <= 255) & (found == np.trunc(found)) | (found == NO_CLASS))]
    if lost.size:
        raise ValueError(f'holds the label {lost[0]:g}, but label maps are read as 8 bits: ids are 0 to 254, and 255 '
                         f'(or {NO_CLASS}) is no class')
    return frozenset(found.astype(int).tolist())


def require_byte_ids(path: str) -> None:
    """Raises ValueError, naming the file, if `label_ids` does; of most files only the header is read.

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
