"""Images and labels that training could not use, or would use otherwise than meant."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from adala_mm.preflight import OK, WARNING
from adala_mm.preflight.images import spread
from helpers.pictures import labels
from helpers.preflight import BATCHES, FOLDER, STAGE1, assert_one_red, check, flagship, red
from helpers.recipes import pretrained_file, stage1


def test_truncated_image(root):
    path = root / FOLDER / 'images/training/ADE_train_00000002.jpg'
    path.write_bytes(path.read_bytes()[:-200])
    result = flagship(root, **BATCHES)
    assert_one_red(result, 'train_dataloader images', path, 'truncated', '1 cannot be decoded, 4 of 4', fix='replace')


def test_truncated_label(root):
    path = root / FOLDER / 'annotations/validation/ADE_validat_00000001.png'
    path.write_bytes(path.read_bytes()[:-60])
    assert 'val_dataloader labels' in {finding['name'] for finding in red(flagship(root, **BATCHES))}


def test_label_of_another_size(root):
    path = root / FOLDER / 'annotations/validation/ADE_validat_00000000.png'
    labels(path, range(151), 60, 100)
    wrong = {finding['name']: finding for finding in red(flagship(root, **BATCHES))}
    assert f'{path} ((60, 100), its image (80, 100))' in wrong['val_dataloader labels']['found']


def test_label_out_of_range(root):
    path = root / FOLDER / 'annotations/validation/ADE_validat_00000001.png'
    labels(path, [3, 200, 7], 80, 120)
    wrong = red(flagship(root, **BATCHES))
    assert wrong[0]['name'] == 'val_dataloader labels'
    assert f'{path} (199)' in wrong[0]['found'] and 'num_classes=150' in wrong[0]['found']
    assert 'num_classes' in wrong[0]['fix']


def binary(root: Path, values: list[int], reduce: bool) -> tuple[int, dict]:
    """The flagship for two classes whose label files hold ``values``."""
    for path in root.glob(f'{FOLDER}/annotations/*/*.png'):
        with Image.open(path) as old:
            labels(path, values, old.height, old.width)
    options = {f'{loader}_dataloader.dataset.{key}': value for loader in ('train', 'val') for key, value in {
        'type': 'BaseSegDataset', 'metainfo.classes': ['other', 'road'], 'reduce_zero_label': reduce}.items()}
    return flagship(root, **BATCHES, **options, **{
        'model.decode_head.num_classes': 2, 'model.decode_head.loss_cls.class_weight': [1.0, 1.0, 0.1],
        'train_dataloader.dataset.pipeline.1.reduce_zero_label': reduce,
        'val_dataloader.dataset.pipeline.2.reduce_zero_label': reduce})


@pytest.mark.parametrize(('values', 'reduce'), [([0, 1], False), ([0, 1, 255], False), ([0, 1, 2], True)])
def test_labels_of_two_classes(values, reduce, root):
    assert red(binary(root, values, reduce)) == []


def test_reduce_zero_label_is_needed(root):
    wrong = red(binary(root, [0, 1, 2], False))
    assert wrong[0]['name'] == 'train_dataloader labels' and '(2)' in wrong[0]['found']
    assert 'reduce_zero_label=True' in wrong[0]['fix']


def test_reduce_zero_label_drops_a_class(root):
    wrong = red(binary(root, [0, 1], True))
    assert {finding['name'] for finding in wrong} == {'train_dataloader labels', 'val_dataloader labels'}
    assert all('labels run from 0 to 1' in finding['found'] and 'reduce_zero_label=False' in finding['fix']
               for finding in wrong)


def test_reduce_zero_label_of_dataset_and_pipeline_differ(root):
    wrong = red(flagship(root, **BATCHES, **{'train_dataloader.dataset.pipeline.1.reduce_zero_label': False}))
    assert {finding['name'] for finding in wrong} >= {'train_dataloader labels', 'train_dataloader batch'}
    assert 'agree on reduce_zero_label' in next(finding['fix'] for finding in wrong
                                                if finding['name'] == 'train_dataloader labels')


def written(root: Path, make: Callable[[np.ndarray], np.ndarray]) -> None:
    """All label files of the flagship, changed."""
    for path in root.glob(f'{FOLDER}/annotations/*/*.png'):
        with Image.open(path) as image:
            ids = np.asarray(image).astype(np.uint16)
        Image.fromarray(make(ids)).save(path)


@pytest.mark.parametrize(('make', 'found'), [
    (lambda ids: np.where(ids == 7, 300, ids).astype(np.uint16), 'holds the label 300, but'),
    (lambda ids: ids * 256, 'holds the label 256, but'),
    (lambda ids: ids + 26000, 'holds the label 26000, but'),
    (lambda ids: np.repeat(ids[..., None].astype(np.uint8), 3, axis=2), 'is a picture in colours (RGB)'),
], ids=['16 bits', 'times 256', 'instances', 'colours'])
def test_labels_that_8_bits_do_not_hold(make, found, root):
    written(root, make)
    wrong = {finding['name']: finding for finding in red(flagship(root, **BATCHES))}
    assert found in wrong['train_dataloader labels']['found'] and 'no maps of class ids' in wrong[
        'train_dataloader labels']['found']
    assert '255 for none' in wrong['train_dataloader labels']['fix']
    if 'RGB' not in found:
        assert found in wrong['train_dataloader batch']['found']  # as training says it


def test_labels_of_16_bits_that_fit(root):
    written(root, lambda ids: np.where(ids == 7, 65535, ids).astype(np.uint16))
    code, findings = flagship(root, **BATCHES)
    assert code == 0 and findings['train_dataloader labels'][0]['status'] == OK


@pytest.mark.parametrize(('values', 'found', 'fix'), [
    ([0, 255], 'class 0 alone occurs, label files hold 0, 255', 'write 0 and 1 instead of 0 and 255'),
    ([1], 'class 1 alone occurs, label files hold 1', 'look at the label files'),
    ([255], 'no class occurs, label files hold 255', 'look at the label files'),
])
def test_one_class_alone(values, found, fix, root):
    code, findings = binary(root, values, False)
    assert code == 0
    for loader in ('train', 'val'):
        (finding,) = findings[f'{loader}_dataloader labels']
        assert finding['status'] == WARNING and found in finding['found'] and fix in finding['fix']


# Pixels, and files that are not taken.


def test_float_images(root):
    """OpenCV makes something of them, Pillow black, and nobody knows their range."""
    path = root / 'coco/train2017/float.tif'
    cv2.imwrite(str(path), np.linspace(0, 1, 64 * 64 * 3, dtype=np.float32).reshape(64, 64, 3))
    result = check(STAGE1, '--data-root', root, options=stage1() | {
        'model.backbone.init_cfg.checkpoint': pretrained_file(Path('model.safetensors'))})
    assert_one_red(result, 'train_dataloader images', path, 'its values are float32, of unknown range', fix='replace')


def test_images_that_the_pipeline_reads_otherwise(root):
    """Stage 3 is mmcv's, which does not turn WebP files."""
    for path in list(root.glob(f'{FOLDER}/images/*/*.jpg')):
        exif = Image.Exif()
        exif[0x0112] = 3
        with Image.open(path) as image:
            image.save(path.with_suffix('.webp'), exif=exif)
        path.unlink()
    code, findings = flagship(root, **BATCHES, **{
        f'{loader}_dataloader.dataset.{key}': value for loader in ('train', 'val') for key, value in {
            'type': 'BaseSegDataset', 'metainfo.classes': list(map(str, range(150))), 'img_suffix': '.webp',
            'seg_map_suffix': '.png', 'reduce_zero_label': True}.items()})
    (finding,) = findings['train_dataloader images']
    assert code == 0 and finding['status'] == WARNING
    assert finding['found'].startswith('4 are read in another way') and 'upright' in finding['fix']


def test_images_nearly_black(root):
    for path in (root / 'coco/train2017').iterdir():
        path.unlink()
    for i in range(4):
        values = np.random.default_rng(i).integers(0, 4096, (80, 80), dtype=np.uint16)
        cv2.imwrite(str(root / f'coco/train2017/{i}.png'), values)
    _, findings = check(STAGE1, '--data-root', root, options=stage1())
    (finding,) = findings['train_dataloader images']
    assert finding['status'] == WARNING and '4 have 16 bits and are nearly black in 8' in finding['found']


def test_samples_are_spread_and_the_same_every_time():
    assert spread(1000, 5) == [0, 250, 500, 749, 999]
    assert spread(3, 300) == spread(3, None) == [0, 1, 2]
    assert spread(0, 300) == []
