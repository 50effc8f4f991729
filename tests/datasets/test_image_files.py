"""Images from folders, lists of files and tar shards: the same samples, and a spoilt one stops no run."""
from __future__ import annotations

import os
import re
import tarfile

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.runner import Runner
from mmpretrain.datasets import CustomDataset

from adala_mm.datasets.tar_shards import TarBackend
from helpers.photographs import (
    GOOD,
    KINDS,
    NAMES,
    PIPELINE,
    SPOILT,
    build,
    draw,
    lay_out,
    name_of,
    of_each_kind,
    spoilt,
)


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
