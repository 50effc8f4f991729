"""Files and folders of data: those that lack, and those that are not taken."""
from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from mmpretrain.datasets import CustomDataset

from adala_mm.preflight import ERROR, OK, WARNING
from adala_mm.preflight.data import not_taken
from helpers.preflight import BATCHES, FOLDER, STAGE1, assert_one_red, check, classifier, flagship, red
from helpers.recipes import stage1


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
