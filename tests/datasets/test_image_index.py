"""The index of a data set: made once, shared by processes, and made again where something has changed."""
from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from adala_mm.datasets import image_index
from helpers.photographs import GOOD, KINDS, NAMES, build, draw, lay_out, name_of, of_each_kind


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
