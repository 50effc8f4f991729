"""Decodes many images and label files completely, and notes sizes and label values."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmcv.transforms import LoadAnnotations
from mmcv.transforms import LoadImageFromFile as MmcvLoadImageFromFile
from mmengine import fileio
from mmengine.utils import ProgressBar

from adala_mm.datasets import LoadImageFromFile
from adala_mm.preflight.report import Skipped, one_line
from adala_mm.utils.image_files import as_it_is, decode_image, mmcv_may_differ
from adala_mm.utils.label_files import distinct, keeps_low_byte, label_ids

DARK = 16  # of 256: what 12 bits in a file of 16 become


@dataclass(frozen=True)
class Look:
    """One image and its label: sides in pixels (h, w), label values as training gets them, or what is wrong."""

    path: str
    size: tuple[int, int] | None = None
    error: str = ''
    otherwise: bool = False  # the pipeline reads it in another way than the tools
    dark: bool = False  # 16 bits of which only low ones are used
    label_path: str = ''
    label_size: tuple[int, ...] | None = None
    values: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()  # label values in the file
    label_error: str = ''
    no_ids: str = ''  # why the label file is no map of class ids


def spread(total: int, count: int | None) -> list[int]:
    """``count`` indices evenly over ``total``, ends included; all of them for None."""
    return np.linspace(0, total - 1, total if count is None else min(count, total)).round().astype(int).tolist()


def image_loader(dataset: Any) -> Callable[[dict], dict]:
    """What reads the images in a data set's pipeline: the step itself, so that checking and training agree."""
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', [])
    kinds = (MmcvLoadImageFromFile, LoadImageFromFile)
    return next((step for step in steps if isinstance(step, kinds)), LoadImageFromFile())


def look_at_image(path: str, load: Callable[[dict], dict]) -> dict[str, Any]:
    """Facts of a `Look`."""
    content = fileio.get(path)
    try:
        image = load(dict(img_path=path))['img']
    except Exception:  # its reason is often not more than that there is none
        decode_image(content)
        raise
    otherwise = mmcv_may_differ(content) and not np.array_equal(image, decode_image(content))
    raw = as_it_is(content) if image.max() < DARK else None
    return dict(size=image.shape[:2], otherwise=otherwise, dark=raw is not None and raw.dtype == np.uint16)


def label_loader(dataset: Any) -> LoadAnnotations | None:
    """What reads the label maps in a data set's pipeline; None if it has none."""
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', [])
    # mmdet's kind reads boxes, and label maps only if told so.
    return next((step for step in steps if isinstance(step, LoadAnnotations) and step.with_seg), None)


def look_at(info: dict[str, Any], load: Callable[[dict], dict], load_label: LoadAnnotations | None) -> Look:
    """Image and, if ``load_label`` is given, label map of one entry of a data set."""
    path = info['img_path']
    facts: dict[str, Any] = {}
    try:
        facts = look_at_image(path, load)
    except Exception as error:  # readers raise a dozen types for what is the same to the user
        facts['error'] = one_line(error)
    label_path = info.get('seg_map_path')
    if load_label is not None and label_path:
        facts['label_path'] = label_path
        try:
            facts['written'] = label_ids(label_path)
        except ValueError as error:
            if keeps_low_byte(load_label):
                return Look(path, **facts, no_ids=one_line(error))
        except OSError:
            pass  # not there, damaged, or of a kind that another decoder knows: the pipeline says
        try:
            label = load_label(dict(info, seg_fields=[]))['gt_seg_map']
            facts.update(label_size=label.shape, values=frozenset(distinct(label).tolist()))
        except Exception as error:  # likewise
            facts['label_error'] = f'{type(error).__name__}: {one_line(error)}'
    return Look(path, **facts)


def scan(dataset: Any, name: str, count: int | None, workers: int) -> Iterator[Look]:
    """Looks at ``count`` images, spread evenly over ``dataset``, with progress on a terminal.

    Raises:
        Skipped: if the data set knows no image files of this machine.
    """
    infos = [dataset.get_data_info(i) for i in spread(len(dataset), count)]
    if any('://' in str(info.get('img_path', '://')).removeprefix('tar://') for info in infos):
        raise Skipped('its images are no files of this machine')
    load, load_label = image_loader(dataset), label_loader(dataset)
    bar = ProgressBar(len(infos), file=sys.stderr) if infos and sys.stderr.isatty() else None
    with ThreadPoolExecutor(workers) as pool:  # decoders let other threads run
        for look in pool.map(lambda info: look_at(info, load, load_label), infos):
            if bar:
                bar.update()
            yield look
    if bar:
        print(f' {name}', file=sys.stderr)
