from __future__ import annotations

from mmcv.transforms import BaseTransform
from mmengine import fileio

from adala_mm.registry import TRANSFORMS
from adala_mm.utils.image_files import decode_image


@TRANSFORMS.register_module()
class LoadImageFromFile(BaseTransform):
    """Reads ``img_path`` as `decode_image` does, to ``img`` (H, W, 3) uint8 BGR, ``img_shape`` and ``ori_shape``.

    mmcv's step of this name differs in WebP and AVIF files with an EXIF orientation, which it leaves as they lie, and
    does not say why a file cannot be read. Stage 3 keeps mmcv's: the inferencers of mmseg and mmpretrain know it by its
    name.

    Args:
        backend_args: of MMEngine's ``fileio.get``.

    Raises:
        ValueError: saying why the file cannot be decoded.
    """

    def __init__(self, backend_args: dict | None = None) -> None:
        self.backend_args = backend_args

    def transform(self, results: dict) -> dict:
        image = decode_image(fileio.get(results['img_path'], backend_args=self.backend_args))
        return dict(results, img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
