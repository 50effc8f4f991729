"""Class ids of label files, written by Pillow, OpenCV and tifffile, are read as written or refused with a reason."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from adala_mm.utils.label_files import label_ids, require_byte_ids

BYTE = np.array([[0, 1, 7], [19, 254, 255]], np.uint8)
WIDE = np.array([[0, 1, 7], [19, 255, 65535]], np.uint16)


def palette(path: Path) -> None:
    image = Image.new('P', (3, 2))
    image.putpalette([value for i in range(256) for value in (255 - i, i, 99)])
    image.putdata(BYTE.ravel().tolist())
    image.save(path)


@pytest.mark.parametrize(('name', 'write', 'ids'), [
    ('grey.png', lambda path: Image.fromarray(BYTE).save(path), set(BYTE.flat)),
    ('palette.png', palette, set(BYTE.flat)),
    ('bits.png', lambda path: Image.fromarray(BYTE > 7).save(path), {0, 1}),
    ('wide.png', lambda path: Image.fromarray(WIDE).save(path), set(WIDE.flat)),
    ('wide of opencv.png', lambda path: cv2.imwrite(str(path), WIDE), set(WIDE.flat)),
    ('wide.tif', lambda path: tifffile.imwrite(path, WIDE), set(WIDE.flat)),
    ('int32.tif', lambda path: tifffile.imwrite(path, WIDE.astype(np.int32)), set(WIDE.flat)),
    ('float.tif', lambda path: tifffile.imwrite(path, BYTE.astype(np.float32)), set(BYTE.flat)),
])
def test_ids_are_those_in_the_file(name, write, ids, tmp_path):
    write(tmp_path / name)
    assert label_ids(str(tmp_path / name)) == ids
    require_byte_ids(str(tmp_path / name))


@pytest.mark.parametrize(('name', 'array', 'what'), [
    ('256.png', np.array([[0, 256]], np.uint16), 'holds the label 256, but label maps are read as 8 bits'),
    ('ids.png', np.arange(0, 65536, 256, dtype=np.uint16)[None], 'holds the label 256'),
    ('instances.tif', np.array([[26000, 70000]], np.int32), 'holds the label 26000'),
    ('negative.tif', np.array([[0, -1]], np.int32), 'holds the label -1'),
    ('fraction.tif', np.array([[0, 0.5]], np.float32), 'holds the label 0.5'),
    ('nan.tif', np.array([[0, np.nan]], np.float32), 'holds the label nan'),
    ('colours.png', np.zeros((2, 2, 3), np.uint8), r'is a picture in colours \(RGB\), not a map of class ids'),
])
def test_what_the_low_byte_would_change(name, array, what, tmp_path):
    path = tmp_path / name
    Image.fromarray(array).save(path)
    with pytest.raises(ValueError, match=f'^{what}'):
        label_ids(str(path))
    with pytest.raises(ValueError, match=f'{name} {what}'):
        require_byte_ids(str(path))


def test_what_is_no_image_here_passes(tmp_path):
    require_byte_ids(str(tmp_path / 'absent.png'))
    require_byte_ids('s3://bucket/labels.png')
    (tmp_path / 'labels.npy').write_bytes(b'read by another backend')
    require_byte_ids(str(tmp_path / 'labels.npy'))
