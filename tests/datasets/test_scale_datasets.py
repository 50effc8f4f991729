"""Unlabelled images from folders, file lists and tar shards: the same samples, and no spoilt one stops a run."""
from __future__ import annotations

import importlib
import io
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import webdataset
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.runner import Runner
from mmpretrain.datasets import CustomDataset
from mmpretrain.structures import DataSample

from adala_mm.datasets import ImageFiles, image_index
from adala_mm.datasets.tar_shards import TarBackend
from adala_mm.engine import CorruptImagesHook
from adala_mm.registry import DATASETS
from adala_mm.utils.checkpoint import load_checkpoint
from helpers import LINEAR, ROOT, tiny_vit
from helpers.processes import put_back

KINDS = {'folder': {}, 'list': dict(ann_file='list.txt'), 'shards': dict(shards='part-{000..001}.tar')}
PIPELINE = [dict(type='LoadImageFromFile'), dict(type='mmpretrain.RandomFlip', prob=0.5),
            dict(type='mmpretrain.PackInputs')]
NAMES = ['a/00.jpg', 'a/01.JPEG', 'a/02.jpg', 'a/b/03.jpg', 'c/04.jpg', 'c/05.png']
of_each_kind = pytest.mark.parametrize('kind', KINDS)


def encoded(i: int, suffix: str = '.jpg') -> bytes:
    small = np.random.default_rng(i).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return cv2.imencode(suffix, cv2.resize(small, (48 + i, 40), interpolation=cv2.INTER_CUBIC))[1].tobytes()


def lay_out(root: Path, contents: dict[str, bytes] | None = None) -> Path:
    """The same files in all three ways, beside files that are no images."""
    contents = contents or {name: encoded(i, Path(name).suffix) for i, name in enumerate(NAMES)}
    for name, content in contents.items():
        path = root / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        (path.parent / 'notes.txt').write_text('no image')
        (path.parent / '._00.jpg').write_bytes(b'a Mac leaves these')
    (root / 'list.txt').write_text('# the images\n\n' + '\n'.join(contents) + '\r\n')
    with webdataset.ShardWriter(str(root / 'images/part-%03d.tar'), maxcount=3, verbose=0) as writer:
        for name, content in contents.items():
            key, suffix = name.rsplit('.', 1)
            writer.write({'__key__': key, suffix: content, 'cls': '7', 'txt': 'a caption'})
    return root


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """For tests that leave it as it is."""
    return lay_out(tmp_path_factory.mktemp('photos'))


def build(root: Path, kind: str, **options) -> ImageFiles:
    return DATASETS.build(dict(dict(type='adala_mm.ImageFiles', data_root=str(root), data_prefix='images',
                                    pipeline=PIPELINE, **KINDS[kind]), **options))


def name_of(path: str) -> str:
    """Of an image, wherever it lies."""
    return path.split('#')[-1].split('/images/')[-1]


def draw(dataset: ImageFiles, i: int) -> dict:
    random.seed(i), np.random.seed(i)
    return dataset[i]


def test_all_kinds_give_the_same_samples(photos):
    datasets = [build(photos, kind) for kind in KINDS]
    assert [len(dataset) for dataset in datasets] == [len(NAMES)] * 3
    flips = set()
    for i, name in enumerate(NAMES):
        samples = [draw(dataset, i) for dataset in datasets]
        assert [name_of(sample['data_samples'].img_path) for sample in samples] == [name] * 3
        for sample in samples[1:]:
            assert torch.equal(sample['inputs'], samples[0]['inputs'])
        flips.add(samples[0]['data_samples'].flip)
        assert samples[0]['inputs'].shape == (3, 40, 48 + i)
    assert flips == {False, True}  # so that it was worth comparing pixels


def test_folder_and_list_are_as_in_mmpretrain(photos, tmp_path):
    (tmp_path / 'list.txt').write_text('\n'.join(NAMES[::-1]) + '\n')
    for ann_file in ('', str(tmp_path / 'list.txt')):
        theirs = CustomDataset(str(photos), 'images', ann_file, with_label=False, pipeline=[])
        ours = build(photos, 'folder', ann_file=ann_file)
        assert [ours.get_data_info(i) for i in range(6)] == [theirs.get_data_info(i) for i in range(6)]


@of_each_kind
@pytest.mark.parametrize('index_dir', [None, 'index'])
def test_subsets_and_negative_places(photos, tmp_path, kind, index_dir):
    index_dir = index_dir and str(tmp_path / index_dir)
    dataset = build(photos, kind, indices=[4, 1], index_dir=index_dir)
    assert [name_of(dataset.get_data_info(i)['img_path']) for i in (0, 1, -1)] == [NAMES[4], NAMES[1], NAMES[1]]
    assert len(build(photos, kind, indices=2, index_dir=index_dir)) == 2
    with pytest.raises(IndexError):
        dataset.get_data_info(2)


def test_lazy(photos):
    dataset = build(photos, 'folder', lazy_init=True)
    assert not hasattr(dataset, 'data_bytes') and dataset.data_root == str(photos)
    assert len(dataset) == 6


def test_sparing_of_memory(photos, tmp_path):
    """The list is bytes in a file, which workers map and do not copy."""
    dataset = build(photos, 'shards', index_dir=str(tmp_path))
    assert isinstance(dataset.data_bytes, np.memmap) and not dataset.data_list
    assert isinstance(dataset.data_address, np.ndarray) and dataset.data_address.dtype == np.int64


def test_order_does_not_depend_on_the_file_system(photos, monkeypatch):
    scandir = os.scandir
    monkeypatch.setattr(os, 'scandir', lambda path: sorted(scandir(path), key=lambda entry: entry.name, reverse=True))
    dataset = build(photos, 'folder')
    assert [name_of(dataset.get_data_info(i)['img_path']) for i in range(6)] == NAMES


def test_two_processes_share_without_overlap(photos, monkeypatch):
    dataset, drawn = build(photos, 'shards'), []
    for rank in range(2):
        monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda rank=rank: (rank, 2))
        drawn.append([dataset.get_data_info(i)['img_path'] for i in DefaultSampler(dataset, shuffle=True, seed=3)])
    assert len(drawn[0]) == len(drawn[1]) == 3
    assert {name_of(path) for path in drawn[0] + drawn[1]} == set(NAMES)


# ---- unreadable images

GOOD = encoded(0)
SPOILT = {'truncated': GOOD[:len(GOOD) // 2], 'no bytes': b'', 'no image': b'<html>404 Not Found</html>'}


def spoilt(root: Path, content: bytes, *places: int) -> Path:
    """As `lay_out`, with ``content`` in these places; PNGs are left out, so that all are JPEGs."""
    return lay_out(root, {f'{i}.jpg': content if i in places else encoded(i) for i in range(6)})


@of_each_kind
@pytest.mark.parametrize('content', SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize('workers', [0, 2])
def test_the_next_image_stands_in(tmp_path, kind, content, workers):
    dataset = build(spoilt(tmp_path, content, 2, 5), kind)
    loader = Runner.build_dataloader(dict(
        dataset=dataset, batch_size=2, num_workers=workers, sampler=dict(type='DefaultSampler', shuffle=False)), seed=0)
    for _ in range(2):
        samples = [sample for batch in loader for sample in batch['data_samples']]
        assert [name_of(sample.img_path) for sample in samples] == [f'{i}.jpg' for i in (0, 1, 3, 3, 4, 0)]
        notes = [{name_of(path): problem for path, problem in sample.get('corrupt', {}).items()} for sample in samples]
        assert notes == [{}, {}, {'2.jpg': 'no whole image'}, {}, {}, {'5.jpg': 'no whole image'}]


@of_each_kind
def test_no_stand_in_when_testing(tmp_path, kind):
    dataset = build(spoilt(tmp_path, SPOILT['no image'], 2), kind, test_mode=True)
    assert dataset[1]
    with pytest.raises(AssertionError, match='failed to load image: .*2.jpg'):
        dataset[2]


def test_a_file_that_has_gone_stands_back_too(tmp_path):
    dataset = build(lay_out(tmp_path), 'folder')
    (tmp_path / 'images' / NAMES[0]).unlink()
    (problem,) = dataset[0]['data_samples'].corrupt.values()
    assert problem.startswith('FileNotFoundError: ')


def test_nothing_but_unreadable_images(tmp_path):
    dataset = build(spoilt(tmp_path, b'', *range(6)), 'folder', max_refetch=4)
    with pytest.raises(ValueError, match=r'no image in 5 from .*/3.jpg on .* the last being .*/1.jpg \(no whole image'):
        dataset[3]


class Typo:
    def __call__(self, results: dict) -> dict:
        return results['imgs']


def test_mistakes_of_the_pipeline_are_not_the_images(photos):
    dataset = build(photos, 'folder')
    dataset.pipeline.transforms.insert(1, Typo())
    with pytest.raises(KeyError, match='imgs'):
        dataset[0]


def test_an_image_that_a_later_step_declines_is_not_unreadable(photos):
    dataset = build(photos, 'folder')
    dataset.pipeline.transforms.insert(1, lambda results: results if results['sample_idx'] > 1 else None)
    sample = dataset[0]['data_samples']
    assert name_of(sample.img_path) == NAMES[2] and 'corrupt' not in sample


def test_a_pipeline_that_cannot_tell(tmp_path):
    dataset = build(spoilt(tmp_path, b'', 0), 'folder', pipeline=PIPELINE[:1])
    assert 'img' in dataset[1]
    with pytest.raises(ValueError, match='0.jpg cannot be used .* end with mmpretrain.PackInputs'):
        dataset[0]


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """What the data set warned of."""
    lines: list[str] = []

    def print_log(message: str, logger: object = None, level: int = logging.INFO) -> None:
        if level >= logging.WARNING:
            lines.append(message)
    monkeypatch.setattr(image_index, 'print_log', print_log)
    return lines


@pytest.mark.parametrize('index_dir', [None, 'index'])
def test_truncated_shard(tmp_path, warned, index_dir):
    """Images before the cut are used, the one that it goes through is unreadable, the rest is told to be lost."""
    lay_out(tmp_path)
    shard = tmp_path / 'images/part-000.tar'
    with tarfile.open(shard) as archive:
        third = next(member for member in archive if member.name == NAMES[1])
    shard.write_bytes(shard.read_bytes()[:third.offset_data + 100])
    for _ in range(2):  # read anew, or from the index
        dataset = build(tmp_path, 'shards', index_dir=index_dir and str(tmp_path / index_dir))
        assert len(dataset) == 5
        sample = dataset[1]['data_samples']
        (problem,) = sample.corrupt.values()
        assert name_of(sample.img_path) == NAMES[3] and 'the shard ends' in problem
    assert len(warned) == 2 and all(f'{shard} ends within a file' in line for line in warned)


def test_damaged_shard(tmp_path, warned):
    lay_out(tmp_path)
    shard = tmp_path / 'images/part-001.tar'
    with tarfile.open(shard) as archive:
        last = [member for member in archive if member.name.endswith(('jpg', 'png'))][-1]
    with shard.open('r+b') as file:
        file.seek(last.offset)
        file.write(b'\xff' * 512)
    assert len(build(tmp_path, 'shards')) == 5
    assert len(warned) == 1 and f'is damaged or cut off at byte {last.offset:,}' in warned[0]


def test_whole_shards_are_not_called_damaged(photos, warned):
    build(photos, 'shards')
    assert not warned


def test_long_names_in_shards(tmp_path):
    """They take headers of their own, before the bytes."""
    name = f'{"n" * 150}/{"m" * 150}?1+2#.jpg'
    (tmp_path / 'images').mkdir()
    for style in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / 'images/one.tar', 'w', format=style) as archive:
            member = tarfile.TarInfo(name)
            member.size = len(GOOD)
            archive.addfile(member, io.BytesIO(GOOD))
        dataset = build(tmp_path, 'shards', shards='one.tar')
        assert dataset[0]['data_samples'].img_path.endswith(f'#{name}')


# ---- mistakes

@pytest.mark.parametrize(('options', 'error', 'message'), [
    (dict(data_prefix='pictures'), FileNotFoundError, 'no folder of images at .*pictures'),
    (dict(extensions=['.gif']), ValueError, 'images has no images: no file in it ends in .gif'),
    (dict(ann_file='train.txt'), FileNotFoundError, 'no list of images at .*train.txt'),
    (dict(ann_file='absent.txt'), FileNotFoundError, "absent.txt names 'a/nine.jpg 3', but .* no labels"),
    (dict(ann_file='empty.txt'), ValueError, 'empty.txt has no images'),
    (dict(shards='part-{000..003}.tar'), FileNotFoundError,
     r'2 of the 4 shards part-\{000..003\}.tar are not in .*images, the first being part-002.tar'),
    (dict(shards='other-*.tar'), FileNotFoundError, r'no shard other-\*.tar in .*images'),
    (dict(shards='part-{000..001.tar'), ValueError, "shards='part-{000..001.tar' is no pattern"),
    (dict(shards='part-000.tar.gz'), ValueError, 'part-000.tar.gz is compressed.*Unpack it to a plain .tar'),
    (dict(shards='text.tar'), ValueError, r'text.tar is no tar file.*Fetch it again'),
    (dict(shards='empty.tar'), ValueError, r'empty.tar is no tar file'),
    (dict(shards='part-000.tar', extensions=['.gif']), ValueError, 'part-000.tar has no images.*gif'),
    (dict(shards='part-000.tar', ann_file='list.txt'), ValueError, "in one or the other"),
])
def test_mistakes_are_named(tmp_path, options, error, message):
    images = lay_out(tmp_path) / 'images'
    with tarfile.open(images / 'part-000.tar.gz', 'w:gz') as archive:
        archive.add(images / NAMES[0])
    (images / 'text.tar').write_text('404 Not Found ' * 100)
    (images / 'empty.tar').touch()
    (tmp_path / 'empty.txt').write_text('# nothing yet\n')
    (tmp_path / 'absent.txt').write_text(f'{NAMES[0]}\na/nine.jpg 3\n')
    with pytest.raises(error, match=message):
        build(tmp_path, 'folder', **options)


def test_line_break_in_a_name(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images/a\nb.jpg').write_bytes(GOOD)
    with pytest.raises(ValueError, match=re.escape(r"'a\nb.jpg' has a line break in it: rename")):
        build(tmp_path, 'folder')


def test_odd_names(tmp_path):
    names = ['#1.jpg', 'ä ö?.jpg', os.fsdecode(b'\xff.jpg')]
    (tmp_path / 'images').mkdir()
    for name in names:
        (tmp_path / 'images' / name).write_bytes(GOOD)
    for index_dir in (None, str(tmp_path / 'index')):
        dataset = build(tmp_path, 'folder', index_dir=index_dir)
        assert [dataset[i]['data_samples'].img_path for i in range(3)] == [
            os.path.join(tmp_path, 'images', name) for name in names]


@pytest.mark.parametrize('index_dir', [None, 'index'])
@pytest.mark.parametrize('kind', ['folder', 'shards'])
def test_images_that_are_not_taken_are_counted(tmp_path, kind, index_dir, warned):
    contents = {f'{i}{suffix}': GOOD for i, suffix in enumerate(['.jpg', '.gif', '.GIF', '.jp2', '.jpeg'])}
    lay_out(tmp_path, contents)
    for _ in range(2):  # read anew, or from the index
        dataset = build(tmp_path, kind, index_dir=index_dir and str(tmp_path / index_dir),
                        **dict(shards='part-*.tar') if kind == 'shards' else {})
        assert len(dataset) == 2
        (problem,) = dataset.problems
        assert 'files that look like images and are not taken, 2 .gif, 1 .jp2: if they are meant' in problem
    assert warned == [problem] * 2
    assert len(build(tmp_path, kind, extensions=['.jpg', '.jpeg', '.gif', '.jp2'])) == 5


def test_nothing_but_images_that_are_not_taken(tmp_path):
    lay_out(tmp_path, {'0.gif': GOOD})
    with pytest.raises(ValueError, match='has no images: no file in it ends in .*are not taken, 1 .gif'):
        build(tmp_path, 'folder').full_init()


def test_our_own_step_says_what_is_wrong(tmp_path):
    lay_out(tmp_path, {'0.jpg': SPOILT['truncated'], '1.jpg': b'', '2.jpg': GOOD})
    pipeline = [dict(type='adala_mm.LoadImageFromFile'), *PIPELINE[1:]]
    reasons = build(tmp_path, 'folder', pipeline=pipeline)[0]['data_samples'].corrupt.values()
    assert [reason.split(' (')[0] for reason in reasons] == ['image file is truncated', 'the file is empty']


def test_unreadable_folder(photos, monkeypatch):
    scandir = os.scandir

    def refuse(path: str):
        if str(path).endswith('c'):
            raise PermissionError(f'{path} may not be read')
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(PermissionError, match='images/c may not be read'):
        build(photos, 'folder')


@pytest.mark.parametrize('path', ['tar://part-000.tar', 'tar://part-000.tar?1#a.jpg'])
def test_address_that_is_none(path):
    with pytest.raises(ValueError, match=re.escape(path)):
        TarBackend().get(path)


# ---- the index

@pytest.fixture(autouse=True)
def settled(monkeypatch) -> None:
    """What a test has just written counts as old."""
    monkeypatch.setattr(image_index, 'TICK', 0)


@pytest.fixture
def listings(monkeypatch) -> list:
    """Grows with every time that images are listed afresh."""
    made, find = [], image_index.find
    monkeypatch.setattr(image_index, 'find', lambda source: made.append(source) or find(source))
    return made


@of_each_kind
def test_index_is_made_once(photos, tmp_path, listings, kind):
    first, second = (build(photos, kind, index_dir=str(tmp_path / 'deep/index')) for _ in range(2))
    assert len(listings) == 1 and len(list((tmp_path / 'deep/index').iterdir())) == 1
    for i in range(6):
        assert first.get_data_info(i) == second.get_data_info(i)
        assert torch.equal(draw(first, i)['inputs'], draw(second, i)['inputs'])


def test_every_data_set_has_its_index(photos, tmp_path, listings):
    for _ in range(2):
        for kind in KINDS:
            assert len(build(photos, kind, index_dir=str(tmp_path))) == 6
        assert len(build(photos, 'folder', extensions=['.png'], index_dir=str(tmp_path))) == 1
        assert len(build(photos, 'shards', shards='part-001.tar', index_dir=str(tmp_path))) == 3
    assert len(listings) == len(list(tmp_path.iterdir())) == 5


def grow_folder(root: Path) -> None:
    (root / 'images/a/b/035.jpg').write_bytes(GOOD)


def grow_list(root: Path) -> None:
    with (root / 'list.txt').open('a') as file:
        print('a/00.jpg', file=file)


def grow_shard(root: Path) -> None:
    with tarfile.open(root / 'images/part-001.tar', 'a') as archive:
        archive.add(root / 'images/a/00.jpg', 'new.jpg')


@pytest.mark.parametrize(('kind', 'grow', 'new'), [
    ('folder', grow_folder, (4, 'a/b/035.jpg')), ('list', grow_list, (6, 'a/00.jpg')),
    ('shards', grow_shard, (6, 'new.jpg'))])
def test_index_of_what_has_changed(tmp_path, listings, kind, grow, new):
    lay_out(tmp_path)
    assert len(build(tmp_path, kind, index_dir=str(tmp_path / 'index'))) == 6
    grow(tmp_path)
    dataset = build(tmp_path, kind, index_dir=str(tmp_path / 'index'))
    assert len(listings) == 2 and len(dataset) == 7
    assert name_of(dataset.get_data_info(new[0])['img_path']) == new[1]
    assert len(list((tmp_path / 'index').iterdir())) == 1


def test_new_shard_that_the_wildcard_matches(tmp_path, listings):
    lay_out(tmp_path)
    options = dict(shards='part-*.tar', index_dir=str(tmp_path / 'index'))
    for length in (6, 6, 9):
        if length == 9:
            shutil.copy(tmp_path / 'images/part-000.tar', tmp_path / 'images/part-00.tar')
        dataset = build(tmp_path, 'shards', **options)
        assert len(dataset) == length
    assert len(listings) == 2
    assert [name_of(dataset.get_data_info(i)['img_path']) for i in range(9)] == NAMES[:3] * 2 + NAMES[3:]


def test_rewritten_shard_of_the_same_size(tmp_path, listings):
    lay_out(tmp_path)
    build(tmp_path, 'shards', index_dir=str(tmp_path / 'index'))
    shard = tmp_path / 'images/part-000.tar'
    shard.write_bytes(shard.read_bytes())
    os.utime(shard, ns=(0, 0))
    build(tmp_path, 'shards', index_dir=str(tmp_path / 'index'))
    assert len(listings) == 2


@pytest.mark.parametrize('content', [b'', b'{}\na/00.jpg\n', b'[1]\n', b'\xff\x00', None])
def test_spoilt_index(photos, tmp_path, listings, content):
    build(photos, 'folder', index_dir=str(tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    dataset = build(photos, 'folder', index_dir=str(tmp_path))
    assert len(listings) == 2 and len(dataset) == 6
    assert name_of(dataset.get_data_info(5)['img_path']) == NAMES[5]


def one_of_two(rank: int, root: Path, out: Path) -> None:
    torch.distributed.init_process_group('gloo', f'file://{out}/meeting', rank=rank, world_size=2)
    made, find = [], image_index.find
    image_index.find = lambda source: made.append(source) or find(source)
    dataset = build(root, 'shards', index_dir=str(out / 'index'))
    (out / f'{rank}.json').write_text(json.dumps([len(made), len(dataset)]))
    torch.distributed.destroy_process_group()


def test_the_main_process_lists_for_all(photos, tmp_path):
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=one_of_two, args=(rank, photos, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    assert [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2)] == [[1, 6], [0, 6]]


# ---- counting, listing, stopping

class Log(list):
    warning = list.append


def fake_runner(work_dir: Path) -> SimpleNamespace:
    return SimpleNamespace(work_dir=str(work_dir), logger=Log(), hooks=[])


@pytest.mark.parametrize('kind', [list, tuple])
def test_views_of_test_time_augmentation_count_once(kind, tmp_path):
    hook, runner = CorruptImagesHook(), fake_runner(tmp_path)
    hook.before_run(runner)
    samples = batch({}, {'a.jpg': 'truncated'}, {})['data_samples']
    hook.after_test_iter(runner, 0, dict(data_samples=[kind(samples), kind(samples)]))  # of each of two views, a batch
    hook.after_test_epoch(runner)
    assert (hook.drawn, hook.replaced) == (3, 1)


def batch(*corrupt: dict) -> dict:
    return dict(data_samples=[DataSample(metainfo=dict(corrupt=notes) if notes else {}) for notes in corrupt])


def test_hook_counts_and_lists(tmp_path):
    runner, hook = fake_runner(tmp_path), CorruptImagesHook(interval=2)
    hook.before_run(runner)
    hook.after_train_iter(runner, 0, batch({'a.jpg': 'no whole image'}, {}))
    assert not runner.logger and not hook.path.exists()  # a look every other iteration
    hook.after_train_iter(runner, 1, batch({}, {'a.jpg': 'no whole image', 'b.jpg': 'the shard ends'}))
    assert hook.path.read_text() == 'a.jpg\tno whole image\nb.jpg\tthe shard ends\n'
    (line,) = runner.logger
    assert line.startswith('2 of 4 images drawn were unreadable and skipped (50 %), listed in ')
    assert 'a.jpg (no whole image), b.jpg (the shard ends)' in line and str(hook.path) in line
    hook.after_train_iter(runner, 2, batch({'c.jpg': 'no whole image'}))
    hook.after_train_epoch(runner)
    assert len(runner.logger) == 3 and runner.logger[-1].startswith('3 of 5 images drawn were unreadable')
    assert hook.path.read_text().endswith('\nc.jpg\tno whole image\n')


def test_hook_takes_names_that_are_no_utf8(tmp_path):
    runner, hook = fake_runner(tmp_path), CorruptImagesHook(interval=1)
    hook.before_run(runner)
    hook.after_train_iter(runner, 0, batch({os.fsdecode(b'\xff.jpg'): 'no whole image'}))
    assert hook.path.read_bytes() == b'\xff.jpg\tno whole image\n'
    assert r'\udcff.jpg (no whole image)' in runner.logger[0] and runner.logger[0].encode()  # as logs do


def test_hook_lists_each_image_once(tmp_path):
    for _ in range(2):  # a resumed run
        runner, hook = fake_runner(tmp_path), CorruptImagesHook(interval=1)
        hook.before_run(runner)
        for i in range(2):
            hook.after_val_iter(runner, i, batch({'a.jpg': 'no whole image'}))
    assert hook.path.read_text() == 'a.jpg\tno whole image\n'
    assert hook.replaced == 2


def test_hook_is_quiet_about_whole_images_and_other_data(tmp_path):
    runner, hook = fake_runner(tmp_path), CorruptImagesHook(interval=1)
    hook.before_run(runner)
    for i, data in enumerate([batch({}, {}), dict(inputs=torch.zeros(1)), None, (1, 2)]):
        hook.after_train_iter(runner, i, data)
    hook.after_train_epoch(runner)
    hook.after_train(runner)
    assert not runner.logger and not hook.path.exists()


@pytest.mark.parametrize(('max_corrupt', 'allowed'), [(0, 0), (0.002, 2), (0.01, 10)])
def test_hook_stops_a_run_with_too_many(tmp_path, max_corrupt, allowed):
    runner, hook = fake_runner(tmp_path), CorruptImagesHook(max_corrupt, interval=1)
    hook.before_run(runner)
    for i in range(allowed):
        hook.after_train_iter(runner, i, batch({f'{i}.jpg': 'no whole image'}))
    with pytest.raises(ValueError) as info:
        hook.after_train_iter(runner, allowed, batch({f'{allowed}.jpg': 'no whole image'}))
    assert f'more than max_corrupt={max_corrupt:g} allows: 0.jpg (no whole image)' in str(info.value)
    assert ('and 8 more' in str(info.value)) == (allowed == 10)
    assert len(hook.path.read_text().splitlines()) == allowed + 1


def test_hook_goes_by_the_share_later_on(tmp_path):
    runner, hook = fake_runner(tmp_path), CorruptImagesHook(0.01, interval=1)
    hook.before_run(runner)
    hook.drawn = 1988
    for i in range(20):
        hook.after_train_iter(runner, i, batch({f'{i}.jpg': 'no whole image'}))
    with pytest.raises(ValueError, match=r'21 of 2,009 images drawn were unreadable and skipped \(1 %\)'):
        hook.after_train_iter(runner, 20, batch({'20.jpg': 'no whole image'}))


def test_hook_of_two_processes(tmp_path, monkeypatch):
    """Both see the sum, so both stop at the same step; one writes."""
    others = (3, [{'theirs.jpg': 'no whole image'}])
    monkeypatch.setattr('adala_mm.engine.corrupt_images.all_gather_object', lambda own: [others, own])
    for main in (False, True):
        monkeypatch.setattr('adala_mm.engine.corrupt_images.is_main_process', lambda main=main: main)
        runner, hook = fake_runner(tmp_path), CorruptImagesHook(0, interval=1)
        hook.before_run(runner)
        with pytest.raises(ValueError, match='2 of 4 images drawn were unreadable'):
            hook.after_train_iter(runner, 0, batch({'ours.jpg': 'no whole image'}))
        assert hook.path.exists() == main
    assert len(hook.path.read_text().splitlines()) == 2


def test_hook_goes_on_counting_after_a_resume(tmp_path):
    checkpoint = {}
    for resume in (True, False):
        saved, hook = CorruptImagesHook(0.002, interval=1), CorruptImagesHook(0.002, interval=1)
        runner = fake_runner(tmp_path)
        runner._resume = resume
        saved.before_run(runner)
        for i in range(2):
            saved.after_train_iter(runner, i, batch({f'{i}.jpg': 'no whole image'}, {}))
        saved.before_save_checkpoint(runner, checkpoint)
        torch.save(checkpoint, tmp_path / 'saved.pth')
        hook.before_run(runner)
        hook.after_load_checkpoint(runner, load_checkpoint(tmp_path / 'saved.pth'))
        if resume:
            with pytest.raises(ValueError, match='3 of 5 images drawn were unreadable'):
                hook.after_train_iter(runner, 0, batch({'2.jpg': 'no whole image'}))
        else:  # a new run that only starts from the weights
            hook.after_train_iter(runner, 0, batch({'2.jpg': 'no whole image'}))
            assert (hook.replaced, hook.drawn) == (1, 1)
    CorruptImagesHook().after_load_checkpoint(SimpleNamespace(_resume=True), {})  # of before these numbers were kept


@pytest.mark.parametrize('share', [-0.1, 1.5])
def test_hook_takes_a_share(share):
    with pytest.raises(ValueError, match=f'max_corrupt={share} is no share'):
        CorruptImagesHook(share)


# ---- runs

@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where runs write; what they leave in the process is put back."""
    put_back(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage1(root: Path, kind: str, pretrained: dict, workers: int = 0, stage: str = 'stage1_dinov2l_coco') -> Config:
    cfg = Config.fromfile(ROOT / f'configs/adala/{stage}.py')
    cfg.model.backbone = tiny_vit(attention=LINEAR, init_cfg=pretrained)
    if 'teacher' in cfg.model:
        cfg.model.teacher = tiny_vit(init_cfg=pretrained)
    cfg.train_dataloader.update(batch_size=2, num_workers=workers, persistent_workers=False)
    cfg.train_dataloader.dataset.update(data_root=str(root), data_prefix='images', **KINDS[kind])
    cfg.train_dataloader.dataset.pipeline[1].scale = 32
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.logger.interval = 1
    cfg.log_processor.by_epoch = False
    cfg.work_dir = f'work_dirs/{stage}_{kind}_{workers}'
    cfg.experiment_name = cfg.visualizer.name = f'{root.name}_{kind}_{workers}'
    return cfg


def losses(cfg: Config) -> list[float]:
    Runner.from_cfg(cfg).train()
    (log,) = Path(cfg.work_dir).glob('*/vis_data/scalars.json')
    return [json.loads(line)['loss'] for line in log.read_text().splitlines()]


@pytest.mark.parametrize('stage', ['stage1_dinov2l_coco', 'stage2_dinov2l_in22k'])
def test_configs_train_on_each_kind(photos, place, pretrained, stage):
    runs = [losses(stage1(photos, kind, pretrained, stage=stage)) for kind in KINDS]
    assert len(runs[0]) == 2 and all(np.isfinite(runs[0])) and runs[0] == runs[1] == runs[2]
    assert len(list(place.glob('work_dirs/indices/*.txt'))) == 3 * ('in22k' in stage)
    assert not list(place.glob('work_dirs/*/corrupt_images.txt'))


@of_each_kind
def test_run_with_unreadable_images(place, pretrained, kind):
    cfg = stage1(spoilt(place / 'data', SPOILT['truncated'], 1, 4), kind, pretrained, workers=2)
    cfg.train_cfg.max_iters = 3  # all six images
    assert len(losses(cfg)) == 3
    lines = Path(cfg.work_dir, 'corrupt_images.txt').read_text().splitlines()
    assert sorted(name_of(line.split('\t')[0]) for line in lines) == ['1.jpg', '4.jpg']
    (log,) = Path(cfg.work_dir).glob('*/*.log')
    assert '2 of 6 images drawn were unreadable and skipped (33 %), listed in ' in log.read_text()


def test_run_with_too_many_unreadable_images(place, pretrained):
    cfg = stage1(spoilt(place / 'data', b'', 1, 4), 'folder', pretrained, workers=2)
    cfg.train_cfg.max_iters = 3
    cfg.default_hooks.corrupt.max_corrupt = 0
    with pytest.raises(ValueError, match=r'^2 of 6 images drawn .*\d.jpg \(the file is empty\).*Mend the data'):
        losses(cfg)


# ---- the benchmark

@pytest.fixture
def bench(place, monkeypatch, capsys, photos):
    """Runs tools/analysis_tools/benchmark_loader.py on the photographs; its record and what it printed."""
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis_tools')
    module = importlib.import_module('benchmark_loader')
    threads, method = torch.get_num_threads(), multiprocessing.get_start_method(allow_none=True)
    opencv = cv2.getNumThreads()
    data = place / 'data'
    (data / 'coco').mkdir(parents=True)
    shutil.copytree(photos / 'images', data / 'coco/train2017')

    def run(*options: str) -> tuple[dict, str]:
        monkeypatch.setattr(sys, 'argv', [
            module.__file__, str(ROOT / 'configs/adala/stage1_dinov2l_coco.py'), '--data-root', str(data), '--out',
            'loader.json', '--seconds', '1e-9', '--cfg-options', 'train_dataloader.dataset.pipeline.1.scale=32',
            *options])
        module.main()
        return json.loads(Path('loader.json').read_text()), capsys.readouterr().out
    run.module, run.data = module, data
    yield run
    torch.set_num_threads(threads)
    cv2.setNumThreads(opencv)
    multiprocessing.set_start_method(method, force=True)


def test_benchmark(bench):
    (bench.data / 'coco/train2017' / NAMES[0]).write_bytes(b'')
    record, text = bench('--workers', '0', '1', '--batch', '3')
    assert record['config'] == 'stage1_dinov2l_coco' and record['images'] == 6 and record['settings']['batch'] == 3
    assert [row['workers'] for row in record['rows']] == [0, 1]
    for row in record['rows']:
        assert row['images'] == 3 and row['images_per_s'] > 0 and row['corrupt'] <= 1
        assert row['images_per_s'] == pytest.approx(row['images'] / row['seconds'])
        assert row['images_per_s_per_core'] == pytest.approx(row['images'] / max(row['core_seconds'], 0.01))
    assert bench.module.loader_table(record['rows']) in text and '6 images' in text
    assert {'cpu', 'cores', 'commit'} <= set(record['machine'])


def test_benchmark_reads_shards_and_compares(bench):
    Path('training.json').write_text(json.dumps(dict(settings=dict(batch=8), rows=[
        dict(stage=1, version='ours', ms=2 ** -20), dict(stage=2, version='ours', ms=2 ** 20),
        dict(stage=2, version='straightforward', note='out of memory')])))
    record, text = bench('train_dataloader.dataset.shards=part-{000..001}.tar', '--workers', '0', '--batch', '2',
                         '--training', 'training.json')
    assert record['images'] == 6 and record['demands'] == {
        'stage 1, ours': 8000 * 2.0 ** 20, 'stage 2, ours': 8000 / 2 ** 20}
    assert '- stage 1, ours, 8388608000.0 images/s: would wait for data 100 % of the time with 0 workers' in text
    assert '- stage 2, ours, 0.0 images/s: the loader keeps up with 0 workers (1 cores)' in text


def test_benchmark_verdicts(bench):
    rows = [dict(workers=n, images_per_s=s, images_per_s_per_core=s / max(n, 1))
            for n, s in ((0, 100.0), (2, 180.0), (4, 320.0))]
    verdict = bench.module.verdict
    assert verdict('a', 150.0, rows) == 'a, 150.0 images/s: the loader keeps up with 2 workers (2 cores)'
    assert verdict('b', 640.0, rows) == ('b, 640.0 images/s: would wait for data 50 % of the time with 4 workers; '
                                         'needs 7 cores at the measured speed of one')


def test_processor_time_counts_workers_and_leaves_out_waiting(bench, monkeypatch):
    spend = 'import time\nwhile time.process_time() < 0.3: pass\ntime.sleep(60)'
    before = bench.module.core_seconds(0.0, 1)
    child = subprocess.Popen([sys.executable, '-S', '-c', spend])
    try:
        monkeypatch.setattr(multiprocessing, 'active_children', lambda: [child])
        while (spent := bench.module.core_seconds(0.0, 1) - before) < 0.3:
            pass
    finally:
        child.kill()
        child.wait()
    assert spent < 60
    monkeypatch.setattr(bench.module, 'Path', lambda name: Path('/nowhere') / name[1:])
    assert bench.module.core_seconds(3.0, 0) == 3.0  # of one process


def test_benchmark_mistakes(bench, capsys):
    with pytest.raises(SystemExit, match='error: 6 images do not fill a batch of 32: give a smaller --batch'):
        bench('--workers', '0')
    with pytest.raises(SystemExit):
        bench('--training', 'none.json')
    assert 'no record at none.json' in capsys.readouterr().err
    Path('other.json').write_text('{"rows": [{"ms": 1}]}')
    with pytest.raises(SystemExit, match='--training other.json: no record of benchmark_training.py'):
        bench('--training', 'other.json')
    shutil.rmtree(bench.data)
    with pytest.raises(SystemExit, match='error: train_dataloader: .* does not exist'):
        bench()
