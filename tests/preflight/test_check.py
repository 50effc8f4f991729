"""tools/check.py: green where training would run, and one red line with its fix for each thing that would fail."""
from __future__ import annotations

import io
import os
import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.datasets import CustomDataset
from PIL import Image
from torch import nn

from adala_mm.preflight import ERROR, OK, SKIPPED, WARNING, Finding, Plan, memory, write_finding
from adala_mm.preflight.checkpoints import not_downloaded
from adala_mm.preflight.data import not_taken
from adala_mm.preflight.images import spread
from adala_mm.preflight.report import Skipped, findings_of
from adala_mm.preflight.sizes import cropped_size
from helpers import LINEAR, ROOT, tiny_vit
from helpers.pictures import ade20k, coco, labels, photo
from helpers.preflight import CLASSIFIER, check, red
from helpers.recipes import apart, mask2former, pretrained_file, stage1, stage2

FLAGSHIP, STAGE1, STAGE2 = 'mask2former_dinov2l_ade20k', 'stage1_dinov2l_coco', 'stage2_dinov2l_in22k'
ESTIMATE, HEAD_LINE = memory.estimate, memory.head_line
RANDOM = {'model.backbone.init_cfg': None}
BATCHES = {'train_dataloader.batch_size': 2}
FOLDER = Path('ade/ADEChallengeData2016')


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Iterator[Path]:
    # What takes a second in each of many runs; tests that are about it put it back.
    monkeypatch.setattr(memory, 'estimate', lambda plan: lambda batch, height, width: 0)
    monkeypatch.setattr(memory, 'head_line', lambda plan: lambda pixels: 0)
    with apart(tmp_path):
        yield tmp_path


@pytest.fixture
def root(place) -> Path:
    return ade20k(coco(place / 'data'))


def flagship(root: Path, *words: object, **options: object) -> tuple[int, dict[str, list[dict]]]:
    return check(FLAGSHIP, '--data-root', root, *words, options=mask2former() | RANDOM | options)


def assert_one_red(result: tuple[int, dict], name: str, *words: object, fix: str) -> None:
    wrong = red(result)
    assert [finding['name'] for finding in wrong] == [name], wrong
    missing = [str(word) for word in words if str(word) not in wrong[0]['found']]
    assert not missing, f'{missing} not in: {wrong[0]["found"]}'
    assert fix in wrong[0]['fix']


# What is green.


def test_a_segmentor_that_would_train(root, capsys, monkeypatch):
    monkeypatch.setattr(memory, 'estimate', ESTIMATE)
    monkeypatch.setattr(memory, 'head_line', HEAD_LINE)
    code, findings = flagship(root, '--images', 'all', **BATCHES)
    assert code == 0, red((code, findings))
    assert {'model', 'classes', 'checkpoint', 'image sizes', 'memory', 'disk', 'batch and lr', 'loops',
            'optimizer', 'schedule', 'hooks', 'processes'} | {
        f'{loader}_dataloader {what}' for loader in ('train', 'val')
        for what in ('folders', 'counts', 'images', 'labels', 'batch')} == set(findings)
    assert not [finding for group in findings.values() for finding in group if finding['status'] == SKIPPED]
    assert '2 x 3 x 64 x 64' in findings['train_dataloader batch'][0]['found']
    assert '4 of 4 looked at' in findings['train_dataloader images'][0]['found']
    assert 'about' in findings['memory'][0]['found'] and 'estimate' in findings['memory'][0]['found']
    printed = capsys.readouterr().out
    assert '\033' not in printed
    assert printed.splitlines()[-1].endswith('warning') and 'error' not in printed.splitlines()[-1]


def test_stage_1_that_would_train(root):
    weights = pretrained_file(Path('model.safetensors'))
    code, findings = check(STAGE1, '--data-root', root, '--device-memory', '1', options=stage1() | {
        'model.backbone.init_cfg.checkpoint': weights})
    assert code == 0, red((code, findings))
    assert findings['checkpoint of backbone'][0]['found'] == f'{weights} fits'
    assert findings['model'][0]['found'].endswith(
        '; backbone: 2 of 2 blocks LinearAttention; frozen attentions: 2 of 2 blocks SoftmaxAttention')
    assert findings['train_dataloader labels'] == [dict(
        name='train_dataloader labels', status=SKIPPED, found='the pipeline reads no labels', fix='')]


def test_stage_2_that_would_train(root):
    (root / 'imagenet22k').mkdir()
    photo(root / 'imagenet22k/a.JPEG')
    photo(root / 'imagenet22k/b.JPEG')
    weights = pretrained_file(Path('model.safetensors'))
    code, findings = check(STAGE2, '--data-root', root, options=stage2() | {
        f'model.{role}.init_cfg.checkpoint': weights for role in ('backbone', 'teacher')})
    assert code == 0, red((code, findings))
    assert {'checkpoint of backbone', 'checkpoint of teacher'} <= set(findings)


def classifier(place: Path, val_classes: int = 3) -> Path:
    for split, count in (('train', 3), ('val', val_classes)):
        for i in range(count):
            photo(place / 'data/pets' / split / f'kind{i}' / 'a.png')
    path = place / 'pets.py'
    path.write_text(CLASSIFIER)
    return path


def test_a_classifier_that_would_train(place):
    code, findings = check(classifier(place))
    assert code == 0, red((code, findings))
    assert findings['train_dataloader labels'][0]['found'] == '3 classes occur, 1 to 1 images each'
    assert findings['classes'][0]['status'] == OK


# One fault each.


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


def test_missing_label_file(root):
    path = root / FOLDER / 'annotations/training/ADE_train_00000001.png'
    path.unlink()
    wrong = {finding['name']: finding for finding in red(flagship(root, **BATCHES))}
    assert str(path) in wrong['train_dataloader counts']['found']
    assert '1 of 4 images have no label file' in wrong['train_dataloader counts']['found']


def test_listed_image_that_does_not_exist(place):
    path = classifier(place)
    (place / 'data/pets/list.txt').write_text('kind0/a.png 0\nkind1/b.png 1\n')
    wrong = {finding['name']: finding['found'] for finding in red(check(path, options={
        'train_dataloader.dataset.ann_file': 'list.txt'}))}
    assert 'data/pets/train/kind1/b.png' in wrong['train_dataloader counts']


def test_empty_folder(root):
    folder = root / FOLDER / 'images/validation'
    shutil.rmtree(folder)
    folder.mkdir()
    assert_one_red(flagship(root, **BATCHES), 'val_dataloader folders', f'{folder} is empty', fix='--data-root DIR')


def test_folder_without_images(root):
    folder = root / FOLDER / 'images/validation'
    for path in folder.iterdir():
        path.rename(path.with_suffix('.jpeg'))
    wrong = red(flagship(root, **BATCHES))
    assert wrong[0]['name'] == 'val_dataloader counts' and 'no file in the folders' in wrong[0]['found']


def test_class_folders_of_training_and_validation_differ(place):
    wrong = red(check(classifier(place, val_classes=2)))
    assert {finding['name'] for finding in wrong} == {'classes'}
    assert any('val_dataloader has 2 classes' in finding['found'] for finding in wrong)
    assert any("kind2 in one only" in finding['found'] for finding in wrong)


def test_label_beyond_the_classes_of_a_classifier(place):
    wrong = red(check(classifier(place), options={'model.head.num_classes': 2}))
    assert {'train_dataloader labels', 'val_dataloader labels', 'classes'} <= {f['name'] for f in wrong}
    assert 'labels 2 are no classes of head with num_classes=2' in wrong[0]['found']


def test_checkpoint_of_another_family(root):
    path = Path('other.pth')
    torch.save(MODELS.build(tiny_vit(class_token=False)).state_dict(), path)
    result = check(STAGE1, '--data-root', root, options=stage1() | {'model.backbone.init_cfg.checkpoint': path})
    assert_one_red(result, 'checkpoint of backbone', 'other.pth', 'Check class_token', fix='docs/weights.md')


def test_truncated_checkpoint(root):
    path = pretrained_file(Path('half.safetensors'))
    path.write_bytes(path.read_bytes()[:-100])
    result = check(STAGE1, '--data-root', root, options=stage1() | {'model.backbone.init_cfg.checkpoint': path})
    assert_one_red(result, 'checkpoint of backbone', 'half.safetensors', 'truncated', fix='docs/weights.md')


def test_the_teacher_of_a_task_model(monkeypatch):
    monkeypatch.setattr(memory, 'estimate', ESTIMATE)
    name, title = 'task_mask2former_deitt_camvid', 'checkpoint of the teacher'
    (finding,) = check(name)[1][title]
    assert finding['status'] == ERROR and 'run mask2former_deitt_softmax_camvid first' in finding['fix']
    torch.save({'backbone.cls_token': torch.zeros(1, 1, 32)}, 'other.pth')
    _, findings = check(name, options={'model.teacher.checkpoint': 'other.pth'})
    assert 'other shape  backbone.cls_token' in findings[title][0]['found']
    assert findings['memory'][0]['found'] == 'no estimate for a TaskModelAlignment'


def test_the_stage_before_has_not_run(root):
    options = mask2former()
    result = check(FLAGSHIP, '--data-root', root, options=options)
    assert_one_red(result, 'checkpoint of backbone', f'work_dirs/{STAGE2}/epoch_30.pth', 'has not been written',
                   fix=f'run stage 2 first: python tools/train.py {ROOT}/configs/adala/{STAGE2}.py')


def test_the_stage_before_is_not_done(root):
    weights = Path(f'work_dirs/{STAGE1}/epoch_2.pth')
    weights.parent.mkdir(parents=True)
    weights.touch()
    (root / 'imagenet22k').mkdir()
    photo(root / 'imagenet22k/a.JPEG')
    result = check(STAGE2, '--data-root', root, '--gpus', 8, '--device-memory', 80, options=stage2() | {
        'train_dataloader.drop_last': False,
        'model.teacher.init_cfg.checkpoint': pretrained_file(Path('teacher.safetensors'))})
    assert_one_red(result, 'checkpoint of backbone', 'there is epoch_2.pth',
                   fix=f'run stage 1 first: bash tools/dist_train.sh {ROOT}/configs/adala/{STAGE1}.py 8 --resume')


def test_load_from(root):
    path = Path('run.pth')
    torch.save({'state_dict': {'some.weight': torch.ones(2)}}, path)
    assert_one_red(flagship(root, **BATCHES, load_from=path), 'load_from', 'run.pth does not fit', fix='family')
    assert_one_red(flagship(root, '--resume', 'absent.pth', **BATCHES), 'load_from', 'no checkpoint at absent.pth',
                   fix='check the path')


@pytest.mark.parametrize(('name', 'found', 'fix'), [
    ('vit_large_patch14_clip_quickgelu_224.openai', 'is not here and cannot be downloaded (OSError)',
     'fetch https://huggingface.co/timm/vit_large_patch14_clip_224.openai/resolve/main/model.safetensors and name'),
    ('vit_large_patch14_clip_quickgelu.openai', 'knows no weights on the Hugging Face hub for timm://vit_large_patch14_',
     'did you mean timm://vit_large_patch14_clip_quickgelu_'),
])
def test_weights_that_are_not_here(name, found, fix, monkeypatch):
    def refuse(url: str, timeout: float) -> None:
        raise OSError(url)

    monkeypatch.setattr('huggingface_hub.try_to_load_from_cache', lambda repository, file: None)
    monkeypatch.setattr('huggingface_hub.get_hf_file_metadata', refuse)
    finding = not_downloaded('checkpoint of backbone', f'timm://{name}')
    assert finding.status == ERROR and found in finding.found and finding.fix.startswith(fix)


def test_no_pretrained_weights_to_align_with(root):
    assert_one_red(check(STAGE1, '--data-root', root, options=stage1() | RANDOM), 'checkpoint of backbone',
                   'no pretrained weights', fix='--cfg-options model.backbone.init_cfg.type=Pretrained '
                                                'model.backbone.init_cfg.checkpoint=FILE')


def test_crop_that_the_patch_does_not_divide(root):
    wrong = red(check(STAGE1, '--data-root', root, options=stage1() | {
        'model.backbone.init_cfg.checkpoint': pretrained_file(Path('model.safetensors')),
        'train_dataloader.dataset.pipeline.1.scale': 60}))
    found = {finding['name']: finding for finding in wrong}
    assert 'train_dataloader pipeline 60 x 60' in found['image sizes']['found']
    assert 'multiples of 16' in found['image sizes']['fix']
    assert 'does not divide 60 x 60' in found['train_dataloader batch']['found']


def test_image_size_that_the_patch_does_not_divide(root):
    wrong = red(flagship(root, **BATCHES, **{'model.backbone.img_size': 60}))
    assert wrong[0]['name'] == 'model' and 'patches of 16' in wrong[0]['found']


def test_padding_that_the_patch_does_not_divide(root):
    wrong = red(flagship(root, **BATCHES, **{'model.data_preprocessor.test_cfg.size_divisor': 24}))
    assert 'size_divisor=24' in next(f['found'] for f in wrong if f['name'] == 'image sizes')


def test_sliding_window(root):
    slide = BATCHES | {'model.test_cfg.mode': 'slide', 'model.test_cfg.stride': (32, 32)}
    assert red(flagship(root, **slide, **{'model.test_cfg.crop_size': (64, 64)})) == []
    assert_one_red(flagship(root, **slide, **{'model.test_cfg.crop_size': (64, 60)}), 'image sizes',
                   'does not divide test_cfg.crop_size 64 x 60', fix='multiples of 16')
    mmsegs = {'model.test_cfg.crop_size': (64, 64), 'model.decode_head.type': 'Mask2FormerHead'}
    assert_one_red(flagship(root, **slide, **mmsegs), 'image sizes', "mmseg's Mask2FormerHead",
                   fix='model.decode_head.type=adala_mm.Mask2FormerHead')
    assert red(flagship(root, **BATCHES, **{'model.decode_head.type': 'Mask2FormerHead'})) == []


def test_transformers_that_mmpretrain_cannot_be_imported_beside(root, monkeypatch):
    monkeypatch.setattr('adala_mm.utils.mmpretrain_compat.version', {'transformers': '5.1.0'}.__getitem__)
    _, findings = flagship(root, **BATCHES)
    assert [(f['status'], f['found'][:19]) for f in findings['libraries']] == [(WARNING, 'transformers 5.1.0:')]
    assert 'transformers<5' in findings['libraries'][0]['fix']


def test_too_little_disk(root, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(10 ** 9, 10 ** 9 - 10 ** 5, 10 ** 5))
    assert_one_red(flagship(root, **BATCHES), 'disk', '0.0 GB free', '4 checkpoints', fix='max_keep_ckpts=1')


def test_too_little_memory(root, monkeypatch):
    monkeypatch.setattr(memory, 'estimate', ESTIMATE)
    monkeypatch.setattr(memory, 'head_line', HEAD_LINE)
    options = {'train_dataloader.batch_size': 4, 'train_dataloader.dataset.pipeline.3.crop_size': (256, 256),
               'model.data_preprocessor.size': (256, 256)}
    assert_one_red(flagship(root, '--device-memory', '0.05', **options), 'memory', '4 x 256 x 256', '51 MiB on the',
                   fix='train_dataloader.batch_size=')


def test_no_batch(root):
    options = {'train_dataloader.batch_size': 5}
    wrong = {finding['name']: finding for finding in red(flagship(root, **options))}
    assert 'the loader gives no batch: 4 images' in wrong['train_dataloader batch']['found']
    assert 'drop_last drops them all' in wrong['processes']['found']


def test_model_that_cannot_be_built(root):
    code, findings = flagship(root, **BATCHES, **{'model.backbone.attention.type': 'adala_mm.LinearAttn'})
    assert code == 1 and 'Did you mean adala_mm.LinearAttention?' in findings['model'][0]['found']
    assert findings['memory'][0]['status'] == SKIPPED  # told once, not five times
    assert 'LinearAttn' in findings['memory'][0]['found']


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


def test_files_that_are_not_taken(root):
    (root / 'coco/train2017/moving.gif').write_bytes(b'GIF89a')
    (root / 'coco/train2017/map.JP2').write_bytes(b'')
    (root / 'coco/train2017/list.txt').write_text('no image')
    found = check(STAGE1, '--data-root', root, options=stage1())[1]['train_dataloader counts']
    assert [(f['status'], 'are not taken, 1 .gif, 1 .jp2: if they are meant' in f['found']) for f in found] == [
        (WARNING, True)]
    folder = root / FOLDER / 'images/training'
    shutil.copy(folder / 'ADE_train_00000000.jpg', folder / 'ADE_train_00000009.JPEG')
    _, findings = flagship(root, **BATCHES)
    (finding,) = findings['train_dataloader counts']
    assert finding['status'] == WARNING and f'{folder} has files that look like images' in finding['found']
    assert '1 .jpeg' in finding['found']
    assert findings['val_dataloader counts'][0] == dict(
        name='val_dataloader counts', status=OK, found='2 images', fix='')


def test_links_in_circles_and_hidden_folders(root):
    """A walk through them has an end, and what is hidden is none of the data, here and in training."""
    folder = root / 'coco/train2017'
    theirs = CustomDataset(str(folder), with_label=False, pipeline=[])  # its own walk would have no end
    for name in ('one', 'two'):
        (folder / name).symlink_to('.')
    (folder / '.ipynb_checkpoints').mkdir()
    (folder / '.ipynb_checkpoints/0-checkpoint.gif').touch()
    assert not_taken(theirs) == []
    _, findings = check(STAGE1, '--data-root', root, options=stage1())
    assert [finding['found'] for finding in findings['train_dataloader counts']] == ['4 images']


@pytest.mark.parametrize('damage', [b'', None])
def test_images_in_shards_are_looked_at(damage, root):
    """As in training, which reads them."""
    folder = root / 'coco/train2017'
    first, *_ = sorted(folder.iterdir())
    if damage is None:
        first.rename(folder / os.fsdecode(b'\xff.jpg'))  # no UTF-8: findings are printed all the same
        (folder / os.fsdecode(b'\xff.jpg')).write_bytes(b'no image')
    else:
        first.write_bytes(damage)
    subprocess.run(['tar', '-cf', 'all.tar', '.'], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    result = check(STAGE1, '--data-root', root, options=stage1() | {'train_dataloader.dataset.shards': 'all.tar'})
    (finding,) = result[1]['train_dataloader images']
    assert finding['status'] == ERROR and '1 cannot be decoded, 4 of 4 looked at: tar://' in finding['found']


# Recipes and processes.


@pytest.mark.parametrize(('words', 'options', 'status', 'fix'), [
    (['--gpus', 8], {}, OK, ''),
    (['--gpus', 2], {'optim_wrapper.accumulative_counts': 4}, OK, ''),
    (['--gpus', 2], {'optim_wrapper.optimizer.lr': 2.5e-3}, OK, ''),
    (['--gpus', 2, '--auto-scale-lr'], {}, OK, ''),
    (['--gpus', 2], {}, WARNING, '--auto-scale-lr or --cfg-options optim_wrapper.optimizer.lr=0.0025, or keep the lr '
                                 'and set optim_wrapper.accumulative_counts=4'),
    (['--gpus', 8], {'optim_wrapper.optimizer.lr': 1e-4}, WARNING, '--cfg-options optim_wrapper.optimizer.lr=0.01'),
])
def test_batch_and_learning_rate(words, options, status, fix):
    _, findings = check(STAGE1, *words, options=stage1() | {'train_dataloader.batch_size': 32} | options)
    assert [(f['status'], f['fix']) for f in findings['batch and lr']] == [(status, fix)]


def test_processes(root):
    _, findings = flagship(root, '--gpus', 4, '--device-memory', 80, **{'train_dataloader.drop_last': False})
    found = [(f['status'], f['found']) for f in findings['processes']]
    assert (WARNING, '2 validation images for 4 processes: some repeat what others do') in found
    assert (WARNING, '1 training images for each of 4 processes, fewer than batch_size=2') in found


def test_more_processes_than_gpus(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    wrong = red(flagship(root, '--gpus', 2, **{'train_dataloader.batch_size': 1}))
    assert [f['found'] for f in wrong] == ['2 processes, but 1 GPUs are visible']
    assert '--gpus 1' in wrong[0]['fix']


def test_batch_norm_that_is_not_synchronised():
    words = 'upernet_l2vitt_ade20k', '--gpus', 8, '--device-memory', 80
    assert not [f for f in check(*words)[1]['processes'] if 'BatchNorm' in f['found']]
    _, findings = check(*words, options={'sync_bn': None})
    assert any('BatchNorm layers see 2 images' in f['found'] and 'sync_bn=torch' in f['fix']
               for f in findings['processes'])


# Every config.


@pytest.mark.parametrize('name', [
    'stage1_dinov2l_fast_coco', 'stage2_clipl_in22k', 'cls_dinov2b_in1k', 'mask2former_dinov2b_1024_cityscapes',
    'mask2former_deitt_camvid', 'stage2_deitt_caltech', 'cls_l2vitt_in1k', 'stage2_demo_beacons',
    'fcn_demo_beacons'])
def test_configs_without_data(name, monkeypatch):
    monkeypatch.setattr(memory, 'estimate', ESTIMATE)
    code, findings = check(name, '--data-root', 'nowhere', '--device-memory', 80, '--gpus', 8)
    wrong = red((code, findings))
    drawn = name == 'fcn_demo_beacons'
    assert code == 1 and ('train_dataloader folders' in {f['name'] for f in wrong}) != drawn
    for finding in wrong:
        assert finding['fix'] and 'Error' not in finding['found'].split(':')[0], finding
        if 'folders' in finding['name']:
            assert 'nowhere' in finding['found'] and '--data-root DIR' in finding['fix']
    for what in ('model', 'disk', 'batch and lr', 'memory'):
        assert findings[what][0]['status'] in (OK, WARNING), findings[what]
    if '_demo_' in name:
        assert any('run teacher_demo_beacons first' in f['fix'] and '--work-dir work_dirs/demo/teacher' in f['fix']
                   for f in wrong)


# Parts.


def test_a_check_that_fails_is_a_finding():
    def broken() -> Iterator[Finding]:
        yield Finding('a', OK, 'b')
        raise KeyError('unexpected')

    def impossible() -> Iterator[Finding]:
        raise Skipped('no data')
        yield

    assert [f.status for f in findings_of('a', broken)] == [OK, ERROR]
    assert list(findings_of('a', broken))[1].found == "KeyError: 'unexpected'"
    assert list(findings_of('a', impossible)) == [Finding('a', SKIPPED, 'no data')]


def test_colour_only_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    finding = Finding('disk', ERROR, 'full', 'empty it')
    plain, terminal = io.StringIO(), Terminal()
    write_finding(finding, plain)
    write_finding(finding, terminal)
    assert plain.getvalue() == 'error   disk: full\n        -> empty it\n'
    assert terminal.getvalue().startswith('\033[31merror')


def test_samples_are_spread_and_the_same_every_time():
    assert spread(1000, 5) == [0, 250, 500, 749, 999]
    assert spread(3, 300) == spread(3, None) == [0, 1, 2]
    assert spread(0, 300) == []


@pytest.mark.parametrize(('steps', 'size'), [
    ([dict(type='LoadImageFromFile'), dict(type='RandomCrop', crop_size=(64, 96)), dict(type='PackSegInputs')],
     (64, 96)),
    ([dict(type='mmpretrain.RandomResizedCrop', scale=64), dict(type='mmpretrain.ColorJitter')], (64, 64)),
    ([dict(type='CenterCrop', crop_size=64), dict(type='Resize', scale=(2048, 512), keep_ratio=True)], None),
    ([dict(type='Resize', scale=(96, 64))], (64, 96)),
    ([dict(type='LoadImageFromFile'), dict(type='PackSegInputs')], None),
])
def test_size_that_a_pipeline_gives(steps, size):
    assert cropped_size(steps) == size


def measured(model: nn.Module, batch: dict, optimizer: dict) -> int:
    """Weights, optimizer state and the peak of a real step, by PyTorch's profiler."""
    from adala_mm.utils.cost import peak_bytes
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=optimizer))
    model.train_step(batch, wrapper)  # makes the optimizer's state
    wrapper.zero_grad()
    networks = [model, *getattr(model, 'frozen', {}).values()]
    held = memory.held_by(t for network in networks for t in (*network.parameters(), *network.buffers()))
    held += memory.held_by(t for state in wrapper.optimizer.state.values() for t in state.values())
    return held + peak_bytes(lambda: model.train_step(batch, wrapper))


@pytest.mark.parametrize('kind', ['stage 1', 'stage 2', 'segmentor'])
def test_the_estimate_of_memory_against_a_measured_peak(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, 'head_line', HEAD_LINE)
    size, count = 128, 4
    vit = tiny_vit(depth=4, embed_dim=64, img_size=size, attention=LINEAR)
    inputs = torch.rand(count, 3, size, size)
    if kind == 'segmentor':
        model = dict(type='EncoderDecoder', backbone=vit, decode_head=dict(
            type='FCNHead', in_channels=64, channels=32, num_convs=1, concat_input=False, num_classes=8,
            loss_decode=dict(type='CrossEntropyLoss')),
            data_preprocessor=dict(type='SegDataPreProcessor', size=(size, size)))
    else:
        vit['init_cfg'] = dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.pth'))
        torch.save(MODELS.build(dict(vit, init_cfg=None)).state_dict(), tmp_path / 'vit.pth')
        softmax = dict(type='adala_mm.SoftmaxAttention')
        model = dict(type='adala_mm.AttentionAlignment', backbone=vit) if kind == 'stage 1' else dict(
            type='adala_mm.FeatureAlignment', backbone=vit, teacher=dict(vit, attention=softmax))
    optimizer = dict(type='AdamW', lr=1e-4)
    cfg = Config(dict(model=model, optim_wrapper=dict(optimizer=optimizer), train_dataloader=dict(batch_size=count)))
    with DefaultScope.overwrite_default_scope('mmseg'):
        plan = Plan(cfg)
        estimated = ESTIMATE(plan)(count, size, size)
        batch = dict(inputs=inputs)
        if kind == 'segmentor':
            batch['data_samples'] = memory.samples(plan, count, size, size)
            batch['inputs'] = list(inputs)
        real = MODELS.build(cfg.model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('mmengine.model.base_module.print_log', lambda *args, **kwargs: None)
            real.init_weights()
        peak = measured(real, batch, optimizer)
    assert 0.6 * peak < estimated < 1.6 * peak
    assert estimated > 6 * memory.held_by(real.parameters())  # more than weights, gradients and optimizer state


def test_optimizer_state_is_counted_for_what_learns():
    cfg = Config(dict(model=tiny_vit(trainable='qkv'), optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1.0))))
    plan = Plan(cfg)
    network = nn.Module()
    network.backbone = MODELS.build(tiny_vit(trainable='qkv'))
    learn = 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert 0 < learn < 4 * sum(p.numel() for p in network.parameters())
    assert memory.trainable_bytes(plan) == learn and memory.optimizer_bytes(plan) == 2 * learn
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=1.0)
    assert memory.optimizer_bytes(plan) == 0


def test_scaling_a_rate_of_unknown_batch_is_refused(monkeypatch, capsys):
    config = ROOT / 'configs/real/stage1_deitt_caltech.py'
    monkeypatch.setattr(sys, 'argv', ['check.py', str(config), '--auto-scale-lr'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'tools/check.py'), run_name='__main__')
    assert end.value.code == 2
    assert f'--auto-scale-lr: {config} does not say which total batch' in capsys.readouterr().err


def test_findings_with_names_that_are_no_utf8():
    out = io.TextIOWrapper(io.BytesIO(), 'utf-8')
    write_finding(Finding('images', ERROR, os.fsdecode(b'\xff.jpg')), out)
    assert out.buffer.getvalue() == b'error   images: \\udcff.jpg\n'
