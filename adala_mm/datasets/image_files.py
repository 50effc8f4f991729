from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import cv2
import mmcv.transforms  # noqa: F401  registers LoadImageFromFile
from mmengine.dataset import BaseDataset

from adala_mm.datasets.image_index import Source, load_index
from adala_mm.registry import DATASETS

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')


@DATASETS.register_module()
class ImageFiles(BaseDataset):
    """Images without labels from a folder, a file list, or tar shards; the three give the same samples.

    Samples have fixed places, so sampling, splitting over processes and resuming work as for any map-style data set,
    from shards too. A folder is searched with all folders in it and sorted by path, a list keeps its order, and so do
    shards. ``img_path`` of an image in a shard is ``tar://shard?offset+size#name``, which ``LoadImageFromFile`` reads.

    An image that cannot be read or decoded does not stop a run: the next one that can takes its place, always the
    same, and the sample names what it stands in for in its ``data_samples.corrupt``, a dict of paths and reasons.
    `CorruptImagesHook` counts and lists them. The pipeline's first step reads the image; an error in a later one is
    none of the image's and is raised.

    Args:
        data_root, data_prefix: the folder is ``data_root/data_prefix``.
        ann_file: file list, relative to ``data_root``: a path a line, relative to the folder; empty lines and lines
            that start with # are skipped.
        shards: pattern of uncompressed tar files in the folder, as webdataset has it: ``in22k-{000000..000999}.tar``.
            Wildcards may stand in it, too. Every image in the shards is a sample, other files (labels, captions) are
            passed over.
        extensions: of image files, in folders and shards.
        index_dir: folder that keeps the index (`load_index`), best one that all machines see. None: no index is kept,
            and every process lists the images for itself.
        max_refetch: how many images in a row may be unreadable.
        kwargs: of MMEngine's ``BaseDataset`` (``pipeline``, ``indices``, ``lazy_init`` ...). With ``test_mode`` an
            unreadable image raises its error.

    Raises:
        ValueError: if ``ann_file`` and ``shards`` are both given, and as `load_index` does.
        FileNotFoundError: as `load_index` does.
    """

    def __init__(self, data_root: str = '', data_prefix: str = '', ann_file: str = '', shards: str = '',
                 extensions: Sequence[str] = EXTENSIONS, index_dir: str | None = None, max_refetch: int = 100,
                 **kwargs) -> None:
        if ann_file and shards:
            raise ValueError(f'ann_file={ann_file!r} and shards={shards!r}: the images are in one or the other')
        self.shards = shards
        self.extensions = tuple(extension.lower() for extension in extensions)
        self.index_dir = index_dir
        super().__init__(ann_file=ann_file, data_root=data_root, data_prefix=dict(img_path=data_prefix),
                         serialize_data=True, max_refetch=max_refetch, **kwargs)

    @property
    def folder(self) -> str:
        return self.data_prefix['img_path']

    def full_init(self) -> None:
        if self._fully_initialized:
            return
        source = Source(self.folder, self.ann_file, self.shards, self.extensions)
        # What MMEngine calls serialised data, with lines in the place of pickles: workers share it, subsets work.
        self.data_bytes, self.data_address, self.problems = load_index(source, self.index_dir)
        self._fully_initialized = True
        if self._indices is not None:
            self.get_subset_(self._indices)

    def get_data_info(self, idx: int) -> dict:
        """``img_path`` and ``sample_idx`` of an image."""
        idx = range(len(self))[idx]
        start = int(self.data_address[idx - 1]) if idx else 0
        line = self.data_bytes[start:int(self.data_address[idx]) - 1].tobytes()
        path = os.path.join(self.folder, os.fsdecode(line))
        return dict(img_path=f'tar://{path}' if self.shards else path, sample_idx=idx)

    def __getitem__(self, idx: int) -> Any:
        self.full_init()
        corrupt: dict[str, str] = {}
        for i in range(self.max_refetch + 1):
            info = self.get_data_info((idx + i) % len(self))
            path = info['img_path']
            try:
                sample = read(self.pipeline.transforms, info)
            except Exception as error:  # a reader's, of which each kind of damage and file has its own
                if self.test_mode:
                    raise
                corrupt[path] = reason(error)
                continue
            for transform in self.pipeline.transforms[1:]:
                if sample is None:
                    break
                sample = transform(sample)
            if sample is not None:
                return marked(sample, corrupt) if corrupt else sample
        raise ValueError(f'no image in {self.max_refetch + 1} from {self.get_data_info(idx)["img_path"]} on can be '
                         f'used' + (f', the last being {path} ({corrupt[path]})' if path in corrupt else ''))


def read(transforms: list, info: dict) -> Any:
    """What the first step of a pipeline, which reads the image, makes of a data set's entry."""
    return transforms[0](info) if transforms else info


def reason(error: Exception) -> str:
    """What is wrong with an image, in a line."""
    if isinstance(error, (AssertionError, cv2.error)):  # of mmcv's LoadImageFromFile, and OpenCV's for an empty file
        return 'no whole image'
    text = str(error).splitlines()[0] if str(error) else 'no message'
    return text if isinstance(error, ValueError) else f'{type(error).__name__}: {text}'


def marked(sample: Any, corrupt: dict[str, str]) -> Any:
    """The sample, with a note of the images it stands in for."""
    if not isinstance(sample, dict) or not hasattr(sample.get('data_samples'), 'set_metainfo'):
        path, problem = next(iter(corrupt.items()))
        raise ValueError(f'{path} cannot be used ({problem}), and the sample that takes its place has no data_samples '
                         'to note that in. Let the pipeline end with mmpretrain.PackInputs')
    sample['data_samples'].set_metainfo(dict(corrupt=corrupt))
    return sample
