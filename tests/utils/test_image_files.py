"""What training of stages 1 and 2, check.py and the tools see of an image file, format by format."""
from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image, ImageOps, features

from adala_mm import analysis
from adala_mm.preflight.images import look_at
from adala_mm.utils.image_files import decode_image, open_image

y, x = np.mgrid[:16, :24]
RGB = np.stack([10 * x, 15 * y, 5 * (x + y)], axis=-1).astype(np.uint8)
GREY, WIDE = RGB[..., 0], (x * 2600 + y).astype(np.uint16)
GREY3, ALPHA = np.repeat(GREY[..., None], 3, axis=2), (x * 10).astype(np.uint8)
PALETTE = Image.fromarray(RGB).quantize(16)
INDEXED = np.asarray(PALETTE.getpalette()[:48]).reshape(16, 3)[np.asarray(PALETTE)]
INK = 255 - np.dstack([RGB, np.full_like(GREY, 205)])  # cyan, magenta, yellow and black
# What upright is made of the pixels as they lie in the file, by EXIF's number (CIPA DC-008, 4.6.5.1.1).
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1), 8: np.rot90}


def by_pillow(array: np.ndarray, mode: str | None = None, **options) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(array, mode).save(path, **options)


def by_opencv(array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: cv2.imwrite(str(path), array)


def by_tifffile(array: np.ndarray, **options) -> Callable[[Path], None]:
    return lambda path: pytest.importorskip('tifffile').imwrite(path, array, **options)


def by_hand(head: bytes, array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(head + array.tobytes())


def read_everywhere(path: Path) -> np.ndarray:
    """RGB pixels of an image, the same in a pipeline, in check.py and in the tools."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        pipeline = Compose([dict(type='adala_mm.LoadImageFromFile')])
    sample = pipeline(dict(img_path=str(path)))
    pixels = sample['img'][..., ::-1]
    assert sample['img'].flags.c_contiguous and pixels.dtype == np.uint8
    assert sample['img_shape'] == sample['ori_shape'] == pixels.shape[:2]
    assert np.array_equal(pixels, np.asarray(open_image(str(path))))
    assert np.array_equal(pixels, analysis.read_image(str(path), pixels.shape[:2]))
    look = look_at(dict(img_path=str(path)), pipeline.transforms[0], None)
    assert (look.size, look.error, look.otherwise) == (pixels.shape[:2], '', False)
    return pixels


@pytest.mark.parametrize(('name', 'write', 'wanted', 'tolerance'), [
    ('colours.png', by_pillow(RGB), RGB, 0),
    ('colours.bmp', by_pillow(RGB), RGB, 0),
    ('colours.ppm', by_pillow(RGB), RGB, 0),
    ('colours.tif', by_pillow(RGB), RGB, 0),
    ('colours.webp', by_pillow(RGB, lossless=True), RGB, 0),
    ('colours.jp2', by_pillow(RGB), RGB, 0),
    ('colours.jpg', by_pillow(RGB, quality=100, subsampling=0), RGB, 3),
    ('grey.png', by_pillow(GREY), GREY3, 0),
    ('grey.jpg', by_pillow(GREY, quality=100), GREY3, 2),
    ('bits.png', by_pillow(GREY > 99), 255 * np.repeat(GREY[..., None] > 99, 3, axis=2), 0),
    # 16 bits are scaled by their range, 0 to 65535, whatever is used of it: 257 to 1.
    ('16 bits.png', by_pillow(WIDE), WIDE[..., None] / 257, 1),
    ('16 bits.tif', by_pillow(WIDE), WIDE[..., None] / 257, 1),
    ('16 bits.pgm', by_pillow(WIDE), WIDE[..., None] / 257, 1),
    ('16 bits of opencv.png', by_opencv(WIDE), WIDE[..., None] / 257, 1),
    ('16 bits in colours.png', by_opencv(RGB[..., ::-1].astype(np.uint16) * 257), RGB, 0),
    ('16 bits in colours.tif', by_tifffile(RGB.astype(np.uint16) * 257, photometric='rgb'), RGB, 0),
    # What is transparent keeps its colour: a background would be a guess.
    ('alpha.png', by_pillow(np.dstack([RGB, ALPHA])), RGB, 0),
    ('alpha.tif', by_pillow(np.dstack([RGB, ALPHA])), RGB, 0),
    ('lab.tif', lambda path: Image.fromarray(GREY3).convert('LAB').save(path), GREY3, 2),
    ('grey and alpha.png', by_pillow(np.dstack([GREY, ALPHA])), GREY3, 0),
    ('palette.png', PALETTE.save, INDEXED, 0),
    ('transparent palette.png', lambda path: PALETTE.save(path, transparency=3), INDEXED, 0),
    ('cmyk.tif', by_pillow(INK, 'CMYK'), RGB / 255 * 205, 1),
    ('cmyk.jpg', by_pillow(INK, 'CMYK', quality=100), RGB / 255 * 205, 4),
    # Shares of the largest value that the file names.
    ('to 15.pgm', by_hand(b'P5 24 16 15\n', GREY // 16), GREY3 // 16 * 17, 0),
    ('to 15.ppm', by_hand(b'P6\n# of a camera\n24 16\n15\n', RGB // 16), RGB // 16 * 17, 0),
    ('to 1023.pgm', by_hand(b'P5 24 16 1023\n', (GREY.astype(np.uint16) * 4).astype('>u2')),
     GREY3 * 4.0 / 1023 * 255, 1),
    ('to 1023.ppm', by_hand(b'P6 24 16 1023\n', (RGB.astype(np.uint16) * 4).astype('>u2')), RGB * 4.0 / 1023 * 255, 1),
    ('transparent.gif', lambda path: PALETTE.save(path, transparency=3), INDEXED, 0),
    # What OpenCV does not read.
    ('colours.tga', by_pillow(RGB), RGB, 0),
    ('icon.ico', lambda path: Image.fromarray(RGB).save(path, sizes=[(24, 16)]), RGB, 0),
    ('tiles.tif', by_tifffile(RGB, photometric='rgb', tile=(16, 16)), RGB, 0),
    # Of several frames, the first.
    ('frames.gif', lambda path: PALETTE.save(path, save_all=True, append_images=[PALETTE.rotate(180)]), INDEXED, 0),
    ('frames.tif', by_pillow(RGB, save_all=True, append_images=[Image.fromarray(255 - RGB)]), RGB, 0),
    ('frames.webp', by_pillow(RGB, save_all=True, append_images=[Image.fromarray(255 - RGB)], lossless=True), RGB, 0),
], ids=lambda value: value if isinstance(value, str) else '')
@pytest.mark.filterwarnings('ignore:.*mode.*parameter is deprecated')
def test_pixels(name, write, wanted, tolerance, tmp_path):
    write(tmp_path / name)
    found = read_everywhere(tmp_path / name)
    assert found.shape == RGB.shape
    assert np.abs(found - np.broadcast_to(wanted, RGB.shape).astype(float)).max() <= tolerance


@pytest.mark.parametrize('number', UPRIGHT)
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp', pytest.param('avif', marks=pytest.mark.skipif(
    not features.check('avif'), reason='this Pillow writes no AVIF'))])
def test_photographs_are_upright_in_every_format(suffix, number, tmp_path):
    exif, path = Image.Exif(), tmp_path / f'photo.{suffix}'
    exif[0x0112] = number
    Image.fromarray(RGB).save(path, exif=exif, quality=100)
    found, wanted = read_everywhere(path), UPRIGHT[number](RGB)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted.astype(float)).mean() < 8  # the next best turn differs by 40 and more


@pytest.mark.parametrize(('name', 'write', 'why'), [
    ('float.tif', by_pillow(GREY.astype(np.float32)), 'its values are float32, of unknown range: write 8 or 16 bits'),
    ('float colours.tif', by_opencv(RGB.astype(np.float32)), 'its values are float32, of unknown range'),
    ('radiance.hdr', by_opencv(RGB.astype(np.float32)), 'its values are float32'),
    ('float of tifffile.tif', by_tifffile(RGB.astype(np.float32), photometric='rgb'), 'its values are float32'),
    ('double.tif', by_tifffile(GREY.astype(np.float64)), 'its values are float64'),
    ('32 bits.tif', by_pillow(WIDE.astype(np.int32)), 'its values are int32'),
    ('bands.tif', by_tifffile(np.repeat(GREY[None], 5, 0), photometric='minisblack'), None),
    ('text.jpg', lambda path: path.write_text('<html>404 Not Found</html>'), 'no image of a kind that can be read'),
    ('nothing.jpg', lambda path: path.touch(), 'the file is empty'),
    ('cut.jpg', lambda path: path.write_bytes(cv2.imencode('.jpg', RGB)[1].tobytes()[:-60]), 'truncated'),
    ('cut.png', lambda path: path.write_bytes(cv2.imencode('.png', RGB)[1].tobytes()[:-60]), 'truncated'),
], ids=lambda value: value if isinstance(value, str) and '.' in value else '')
def test_what_is_refused_and_why(name, write, why, tmp_path):
    path = tmp_path / name
    write(path)
    if why is None:  # five pages of one channel: the first, like any other file of frames
        assert np.array_equal(read_everywhere(path), GREY3)
        return
    with pytest.raises(ValueError, match=why):
        decode_image(path.read_bytes())
    with pytest.raises(ValueError, match=f'cannot read the image .*{name}: .*{why}'):
        open_image(str(path))
    for kind in ('adala_mm.LoadImageFromFile', 'LoadImageFromFile'):  # also if mmcv's makes something of it
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            load = Compose([dict(type=kind)]).transforms[0]
        assert why in look_at(dict(img_path=str(path)), load, None).error


def odd_files() -> Iterator[tuple[str, bytes]]:
    """Files that two decoders might read in two ways, by name."""
    def encoded(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image.save(file := io.BytesIO(), kind, **options)
        return file.getvalue()

    exact = dict(JPEG=dict(quality=100, subsampling=0), MPO=dict(quality=100, subsampling=0),
                 WEBP=dict(lossless=True, exact=True), PNG={}, TIFF={}, BMP={}, JPEG2000={})
    rgba, others = np.dstack([RGB, ALPHA]), dict(save_all=True, append_images=[Image.fromarray(255 - RGB)])
    for kind in ('JPEG', 'PNG', 'WEBP', 'TIFF'):
        for number in (0, 3, 6, 9):  # 0 and 9 mean nothing
            exif = Image.Exif()
            exif[0x0112] = number
            for name, image in dict(colours=RGB, grey=GREY, alpha=rgba, palette=PALETTE).items():
                if kind != 'JPEG' or name in ('colours', 'grey'):
                    yield f'{kind} {name} {number}', encoded(image, kind, exif=exif, **exact[kind])
    for kind in exact:
        for name, (height, width) in dict(pixel=(1, 1), line=(1, 24), column=(16, 1)).items():
            yield f'{kind} {name}', encoded(RGB[:height, :width], kind, **exact[kind])
    jpeg, png = encoded(RGB, 'JPEG', **exact['JPEG']), encoded(RGB, 'PNG')
    yield 'bytes after a JPEG', jpeg + b'more' * 99
    yield 'bytes after a PNG', png + b'more' * 99
    yield 'torn EXIF', jpeg[:2] + b'\xff\xe1\0\x10Exif\0\0II*\0\xff\xff\xff\xff' + jpeg[2:]
    yield 'progressive', encoded(RGB, 'JPEG', progressive=True, **exact['JPEG'])
    yield 'RGB in a JPEG', encoded(RGB, 'JPEG', keep_rgb=True, quality=100)
    yield 'pictures of two lenses', encoded(RGB, 'MPO', **exact['MPO'], **others)
    yield 'moving PNG', encoded(RGB, 'PNG', **others)
    yield 'moving PNG with a still', encoded(RGB, 'PNG', default_image=True, **others)
    yield 'transparent grey', encoded(GREY, 'PNG', transparency=100)
    yield 'transparent colour', encoded(RGB, 'PNG', transparency=(10, 15, 5))
    yield '4 bits', encoded(PALETTE, 'PNG', bits=4)
    for kind in ('BMP', 'TIFF'):
        for name, image in {'palette': PALETTE, '1 bit': Image.fromarray(GREY > 99), 'alpha': rgba}.items():
            yield f'{kind} {name}', encoded(image, kind)
    for compression in ('tiff_lzw', 'tiff_adobe_deflate', 'packbits'):
        yield compression, encoded(RGB, 'TIFF', compression=compression)
    yield 'fax', encoded(Image.fromarray(GREY > 99), 'TIFF', compression='group4')
    yield 'YCbCr', encoded(Image.fromarray(RGB).convert('YCbCr'), 'TIFF')
    yield 'numbers in words', b'P3\n# c\n3 1\n255\n255 0 0 0 255 0 0 0 255\n'
    yield 'bits', b'P4\n8 1\n\xa0'


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_two_decoders_agree():
    """Pillow, which mmpretrain's and timm's pipelines can use, and `decode_image`."""
    differing = {}
    for name, content in odd_files():
        with Image.open(io.BytesIO(content)) as image:
            theirs = np.asarray(ImageOps.exif_transpose(image).convert('RGB')).astype(int)
        ours = decode_image(content)[..., ::-1]
        if ours.shape != theirs.shape or np.abs(ours - theirs).max() > 4:
            differing[name] = ours.shape, theirs.shape
    assert not differing


def test_formats_that_pillow_reads_by_other_programs_are_refused(monkeypatch):
    """A photograph by its name may be PostScript, which Pillow would have Ghostscript run."""
    Image.fromarray(RGB).save(file := io.BytesIO(), 'EPS')
    monkeypatch.setattr('PIL.EpsImagePlugin.Ghostscript', lambda *args: pytest.fail('was run'))
    with pytest.raises(ValueError, match='no image of a kind that can be read'):
        decode_image(file.getvalue())


def test_a_missing_file_is_called_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_image(str(tmp_path / 'absent.png'))
    assert 'No such file' in look_at(dict(img_path=str(tmp_path / 'absent.png')), lambda info: info, None).error


def test_what_mmcv_reads_otherwise_is_told(tmp_path):
    """Stage 3 keeps mmcv's step: its WebP files lie as they were saved, alpha darkens its TIFF files."""
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: of the same size
    Image.fromarray(RGB).save(tmp_path / 'photo.webp', exif=exif)
    Image.fromarray(RGB).save(tmp_path / 'photo.jpg', exif=exif)
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / 'alpha.tif')
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / 'alpha.png')
    by_hand(b'P5 24 16 15\n', GREY // 16)(tmp_path / 'to 15.pgm')
    by_hand(b'P5 24 16 255\n', GREY)(tmp_path / 'to 255.pgm')
    PALETTE.save(tmp_path / 'transparent.gif', transparency=3)
    with DefaultScope.overwrite_default_scope('mmseg'):
        load = Compose([dict(type='LoadImageFromFile')]).transforms[0]
    looks = {path.name: look_at(dict(img_path=str(path)), load, None) for path in tmp_path.iterdir()}
    assert {name: look.otherwise for name, look in looks.items()} == {
        'photo.webp': True, 'photo.jpg': False, 'alpha.tif': True, 'alpha.png': False, 'to 15.pgm': True,
        'to 255.pgm': False, 'transparent.gif': True}


def test_12_bits_in_16_are_called_dark(tmp_path):
    load = Compose([dict(type='adala_mm.LoadImageFromFile')]).transforms[0]
    for name, array, dark in (('12.png', WIDE // 16, True), ('16.png', WIDE, False), ('8.png', GREY // 32, False)):
        Image.fromarray(array).save(tmp_path / name)
        assert look_at(dict(img_path=str(tmp_path / name)), load, None).dark == dark
