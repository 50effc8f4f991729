"""Images of an analysis: the same pixels for all networks, each with its own normalisation."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image, ImageOps
from torch import Tensor

from adala_mm.datasets import ImageFiles
from adala_mm.registry import DATASETS
from adala_mm.utils.cli import check_data
from adala_mm.utils.image_files import open_image


def read_image(path: str, size: tuple[int, int]) -> np.ndarray:
    """RGB image (H, W, 3) uint8: short side to fit (bicubic, antialiased), the rest cut off at both ends.

    Raises:
        ValueError: if the file is not a whole image.
    """
    return np.asarray(ImageOps.fit(open_image(path), size[::-1], Image.Resampling.BICUBIC))


def normalise(images: Sequence[np.ndarray], preprocessor: dict, device: torch.device | str = 'cpu') -> Tensor:
    """RGB images (H, W, 3) as a network wants them: (B, 3, H, W) with the config's order of channels, mean and std.

    Args:
        preprocessor: ``data_preprocessor`` of MMEngine, mmseg or mmpretrain, which all read files as BGR.
    """
    batch = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float()
    if not any(preprocessor.get(key) for key in ('bgr_to_rgb', 'to_rgb', 'rgb_to_bgr')):
        batch = batch.flip(1)
    if preprocessor.get('mean') is not None:
        mean, std = (batch.new_tensor(preprocessor[key]).view(1, -1, 1, 1) for key in ('mean', 'std'))
        batch = (batch - mean) / std
    return batch


def spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``count`` indices, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


def named_images(names: Sequence[str], wanted: int | None = None) -> list[str]:
    """The images that are named or lie in the folders that are; at most ``wanted`` of them, spread evenly.

    Raises:
        FileNotFoundError: for a name that is neither, and a folder without images.
    """
    paths = []
    for name in names:
        if Path(name).is_dir():
            files = ImageFiles(data_root=name, test_mode=True)
            paths += [files.get_data_info(i)['img_path'] for i in range(len(files))]
        elif Path(name).is_file():
            paths.append(name)
        else:
            raise FileNotFoundError(f'{name}: there is no such file or folder')
    return [paths[i] for i in spread(len(paths), wanted or len(paths))]


def validation_images(cfg: Config, wanted: int) -> list[str]:
    """At most ``wanted`` images of a config's validation set, spread evenly.

    Raises:
        FileNotFoundError: if the data are not there.
        ValueError: if the config has no validation set.
    """
    dataset = (cfg.get('val_dataloader') or {}).get('dataset')
    if not dataset:
        raise ValueError(f'{cfg.filename} has no validation set: say which images, --images FOLDER or FILES')
    check_data(cfg, ('val_dataloader',))
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        dataset = DATASETS.build(dataset)
    return [dataset.get_data_info(i)['img_path'] for i in spread(len(dataset), wanted)]
