"""Images in tar shards: shards that are cut off or damaged, and long names."""
from __future__ import annotations

import io
import tarfile

import pytest

from helpers.photographs import GOOD, NAMES, build, lay_out, name_of


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
