"""Looks at images and label files, many at a time: decoded to the end, sizes and label values noted."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmcv.transforms import LoadAnnotations
from mmengine.utils import ProgressBar
from PIL import Image

from adala_mm.preflight.report import Skipped, one_line
from adala_mm.utils.label_files import label_ids

TURNED = (5, 6, 7, 8)  # values of the EXIF orientation that exchange width and height, as OpenCV does on reading


@dataclass(frozen=True)
class Look:
    """One image and its label: sides in pixels (h, w), label values as training gets them, or what is wrong."""

    path: str
    size: tuple[int, int] | None = None
    error: str = ''
    label_path: str = ''
    label_size: tuple[int, ...] | None = None
    values: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()  # label values in the file
    label_error: str = ''
    no_ids: str = ''  # why the label file is no map of class ids


def spread(total: int, count: int | None) -> list[int]:
    """``count`` indices evenly over ``total``, ends included; all of them for None."""
    return np.linspace(0, total - 1, total if count is None else min(count, total)).round().astype(int).tolist()


def image_size(path: str) -> tuple[int, int]:
    """Height and width of an image, after all of it has been decoded: a truncated one raises OSError."""
    with Image.open(path) as image:
        image.load()
        width, height = image.size
        return (width, height) if image.getexif().get(0x0112) in TURNED else (height, width)


def label_loader(dataset: Any) -> LoadAnnotations | None:
    """What reads the label maps in a data set's pipeline; None if it has none."""
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', [])
    # mmdet's kind reads boxes, and label maps only if told so.
    return next((step for step in steps if isinstance(step, LoadAnnotations) and step.with_seg), None)


def values_of(label: np.ndarray) -> frozenset[int]:
    # Counting is ten times as fast as np.unique, which sorts all pixels.
    values = np.flatnonzero(np.bincount(label.ravel())) if label.dtype == np.uint8 else np.unique(label)
    return frozenset(values.tolist())


def look_at(info: dict[str, Any], load_label: LoadAnnotations | None) -> Look:
    """Image and, if ``load_label`` is given, label map of one entry of a data set."""
    path = info['img_path']
    facts: dict[str, Any] = {}
    try:
        facts['size'] = image_size(path)
    except Exception as error:  # Pillow's readers raise a dozen types for what is the same to the user
        facts['error'] = one_line(error)
    label_path = info.get('seg_map_path')
    if load_label is not None and label_path:
        facts['label_path'] = label_path
        try:
            facts['written'] = label_ids(label_path)
        except ValueError as error:
            return Look(path, **facts, no_ids=one_line(error))
        except OSError:
            pass  # not there, damaged, or of a kind that another decoder knows: the pipeline says
        try:
            label = load_label(dict(info, seg_fields=[]))['gt_seg_map']
            facts.update(label_size=label.shape, values=values_of(label))
        except Exception as error:  # likewise
            facts['label_error'] = f'{type(error).__name__}: {one_line(error)}'
    return Look(path, **facts)


def scan(dataset: Any, name: str, count: int | None, workers: int) -> Iterator[Look]:
    """Looks at ``count`` images, spread evenly over ``dataset``, with progress on a terminal.

    Raises:
        Skipped: if the data set knows no image files of this machine.
    """
    infos = [dataset.get_data_info(i) for i in spread(len(dataset), count)]
    if any('://' in str(info.get('img_path', '://')) for info in infos):
        raise Skipped('its images are no files of this machine')
    load_label = label_loader(dataset)
    bar = ProgressBar(len(infos), file=sys.stderr) if infos and sys.stderr.isatty() else None
    with ThreadPoolExecutor(workers) as pool:  # decoders let other threads run
        for look in pool.map(lambda info: look_at(info, load_label), infos):
            if bar:
                bar.update()
            yield look
    if bar:
        print(f' {name}', file=sys.stderr)
