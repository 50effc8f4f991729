"""Image files to pixels: opened in one way by stages 1 and 2, tools/check.py and the tools (docs/image_files.md)."""
from __future__ import annotations

from io import BytesIO

import cv2
import numpy as np
from mmengine import fileio
from PIL import Image, ImageOps, UnidentifiedImageError

ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
TIFF = b'II*\0', b'MM\0*'
GIF, NETPBM = b'GIF8', (b'P5', b'P6')
RANGES = np.uint8, np.uint16
FORMATS = 'AVIF', 'BMP', 'GIF', 'ICO', 'JPEG', 'JPEG2000', 'MPO', 'PNG', 'PPM', 'TGA', 'TIFF', 'WEBP'
EIGHT_BITS = '1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr', 'LAB'  # modes of Pillow
FLOATING = (*TIFF, b'#?', b'PF', b'Pf')  # TIFF, Radiance and PFM may hold numbers of unknown range


def decode_image(content: bytes) -> np.ndarray:
    """Pixels of an image file, (H, W, 3) uint8 in OpenCV's order of channels, BGR.

    As mmcv's ``LoadImageFromFile`` decodes it, but for `by_pillow` and `rescued`: upright in every format, grey,
    palettes and CMYK become colours, alpha is dropped, of 16 bits the high 8 are taken, of several frames the first.

    Raises:
        ValueError: saying why it cannot be decoded.
    """
    if content.startswith(FLOATING) and (raw := as_it_is(content)) is not None and raw.dtype not in RANGES:
        raise ValueError(f'its values are {raw.dtype}, of unknown range: write 8 or 16 bits')
    image = by_pillow(content)
    if image is None and content:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    return rescued(content) if image is None else image


def open_image(path: str) -> Image.Image:
    """`decode_image` of a file, as Pillow's RGB.

    Raises:
        ValueError: naming the file and why it cannot be decoded.
        FileNotFoundError: if there is none.
    """
    try:
        return Image.fromarray(decode_image(fileio.get(path))[..., ::-1])
    except ValueError as error:
        raise ValueError(f'cannot read the image {path}: {error}') from error


def is_webp_or_avif(content: bytes) -> bool:
    return content[8:12] == b'WEBP' or content[4:8] == b'ftyp'


def mmcv_may_differ(content: bytes) -> bool:
    """Whether a file is of a format that mmcv's ``LoadImageFromFile`` can read in another way than `decode_image`."""
    return content.startswith((*FLOATING, *NETPBM, GIF)) or is_webp_or_avif(content)


def by_pillow(content: bytes) -> np.ndarray | None:
    """Pixels of what OpenCV reads in a way of its own; None for what it reads as other files.

    It leaves WebP and AVIF files as they lie, whatever their EXIF orientation, darkens TIFF files by their alpha, takes
    CIELAB for RGB, paints over what is transparent in a GIF file, and takes values of PGM and PPM files for shares of
    255, whatever their largest one is.

    Raises:
        ValueError: if such a file is damaged.
    """
    if not content.startswith((*TIFF, *NETPBM, GIF)) and not is_webp_or_avif(content):
        return None
    try:
        with Image.open(BytesIO(content)) as image:
            odd = {'TIFF': image.mode in ('RGBA', 'LAB'), 'PPM': True, 'GIF': 'transparency' in image.info}
            if not odd.get(image.format, image.getexif().get(ORIENTATION, 1) != 1):
                return None
            return pixels_of(image)
    except UnidentifiedImageError:
        return None
    except OSError as error:
        raise ValueError(str(error)) from error


def pixels_of(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, BGR, upright; Pillow has 16 bits of PGM files in 32."""
    if image.mode == 'I':
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.ascontiguousarray(np.asarray(ImageOps.exif_transpose(image).convert('RGB'))[..., ::-1])


def as_it_is(content: bytes) -> np.ndarray | None:
    """Values of an image file without any change; None if OpenCV cannot read it."""
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)


def rescued(content: bytes) -> np.ndarray:
    """Pixels of a file that OpenCV cannot read, such as TGA, ICO, and TIFF in tiles that reach beyond the image.

    Raises:
        ValueError: saying why it cannot be read by Pillow either.
    """
    if not content:
        raise ValueError('the file is empty')
    Image.init()
    try:
        # Of Pillow's other formats, some are read by programs that it calls.
        with Image.open(BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            image.load()
            if image.mode in EIGHT_BITS:
                return pixels_of(image)
    except UnidentifiedImageError:
        raise ValueError('no image of a kind that can be read') from None
    except Exception as error:  # Pillow's readers raise a dozen types for damage
        raise ValueError(' '.join(str(error).split()) or type(error).__name__) from error
    raise ValueError(f'{image.format} of a kind ({image.mode}) that cannot be read: write 8 or 16 bits')
