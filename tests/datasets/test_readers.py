"""Folder, list, tar shards and index find the same images with the same bytes, in awkward trees and archives too.

Trees are made by the operating system, archives by tar and by Python's tarfile, which also say what is in them.
"""
from __future__ import annotations

import io
import itertools
import logging
import os
import pkgutil
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine import fileio

from adala_mm.datasets import ImageFiles, image_index
from adala_mm.datasets.image_index import Source, load_index
from adala_mm.datasets.tar_shards import follow
from adala_mm.utils.folders import walk
from helpers.processes import exit_codes

BYTES = os.fsdecode(b'\xff\xfe.jpg')  # no UTF-8
LONG = f'{"n" * 150}/{"m" * 150}.jpg'
FILES = ('0.jpg', 'a/1.jpg', 'a/b/2.JPEG', 'ä ö/日本.png', 'new\rline.jpg', 'tab\t.jpg', 'q?1+2#.jpg', '#comment.jpg',
         ' space.jpg', '100%25.jpg', 'back\\slash.jpg', BYTES, LONG, 'album.jpg/3.jpg', 'a/.store', 'http:/host/4.jpg')
HIDDEN = ('.5.jpg', 'a/._1.jpg', '.ipynb_checkpoints/0-checkpoint.jpg', 'a/.b/6.jpg')
HARD = {'hard.jpg': 'a/1.jpg', 'a/b/hard.png': '0.jpg'}
LINKS = {'a/soft.jpg': '1.jpg', 'a/b/up.jpg': '../../0.jpg', 'chain.jpg': 'a/soft.jpg', 'through.jpg': 'again/1.jpg',
         'to hidden.jpg': 'a/.store', 'to hard.jpg': 'hard.jpg'}
FOLDERS = {'again': 'a', 'me': '.', 'a/loop': '..', 'a/b/loop': '../..', 'a/other': '../ä ö'}
DEAD = {'gone.jpg': 'nowhere.jpg', 'round.jpg': 'round.jpg', 'lost': '../outside/of/it', 'there': 'back',
        'back': 'there'}
WANTED = {name: name for name in FILES if not name.endswith('.store')} | {'empty.jpg': ''} | HARD | {
    'a/soft.jpg': 'a/1.jpg', 'a/b/up.jpg': '0.jpg', 'chain.jpg': 'a/1.jpg', 'through.jpg': 'a/1.jpg',
    'to hidden.jpg': 'a/.store', 'to hard.jpg': 'a/1.jpg'}  # each file's content is its first name


@pytest.fixture(autouse=True)
def settled(monkeypatch) -> None:
    """What a test has just written counts as old."""
    monkeypatch.setattr(image_index, 'TICK', 0)


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """What the readers warned of."""
    lines: list[str] = []
    monkeypatch.setattr(image_index, 'print_log', lambda message, logger=None, level=logging.INFO: (
        lines.append(message) if level >= logging.WARNING else None))
    return lines


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def content_of(root: Path, **options) -> dict[str, str]:
    """What is in each image of a data set, by its name."""
    dataset = ImageFiles(data_root=str(root), pipeline=[], **options)
    paths = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
    names = [path.split('#', 1)[1] if path.startswith('tar://') else os.path.relpath(path, root) for path in paths]
    assert len(set(names)) == len(names)
    return {name: os.fsdecode(fileio.get(path)) for name, path in zip(names, paths, strict=True)}


def tar(root: Path, *words: str) -> None:
    subprocess.run(['tar', *words], cwd=root, check=True, stderr=subprocess.DEVNULL)


@pytest.fixture(scope='module')
def trees(tmp_path_factory) -> Path:
    """An awkward tree, lists of it, archives of it by several programs, and each archive unpacked by tar."""
    place = tmp_path_factory.mktemp('trees')
    root = write(place / 'tree', *FILES, *HIDDEN, 'not taken.gif', 'a/caption.txt')
    (root / 'empty.jpg').touch()
    (root / 'nothing').mkdir()
    os.mkfifo(root / 'pipe.jpg')
    for name, target in HARD.items():
        os.link(root / target, root / name)
    for name, target in (LINKS | FOLDERS | DEAD).items():
        os.symlink(target, root / name)
    names = [f'./{name}' for name in WANTED]  # the way to name what begins with # or a space
    for name, ends, mark in (('list', '\n', ''), ('windows', '\r\n', '\ufeff')):
        (place / f'{name}.txt').write_bytes(os.fsencode(mark + ends.join(['# all', '', *names, ''])))
    for name, form in (('gnu', 'gnu'), ('posix', 'pax')):
        tar(root, '--format', name, '--sort=name', '-cf', f'../tar-{name}.tar', '.')
        with tarfile.open(place / f'python-{name}.tar', 'w', format=getattr(tarfile, f'{form.upper()}_FORMAT')) as file:
            for path in sorted(root.iterdir(), reverse=True):  # links may come before what they lead to
                file.add(path, path.name)
    for path in place.glob('*.tar'):
        path.with_suffix('').mkdir()
        tar(place, '-xf', path.name, '-C', path.stem)
    return place


ARCHIVES = 'tar-gnu', 'tar-posix', 'python-gnu', 'python-posix'
READERS = {'folder': ('tree', {}), **{name: ('tree', dict(ann_file=f'../{name}.txt')) for name in ('list', 'windows')},
           **{f'{name}.tar': ('.', dict(shards=f'{name}.tar')) for name in ARCHIVES},
           **{f'{name} unpacked': (name, {}) for name in ARCHIVES}}


@pytest.fixture(scope='module')
def found(trees) -> Callable[[str, bool], dict[str, str]]:
    """What a reader finds, with or without an index; each is read once."""
    seen = {}

    def read(reader: str, indexed: bool) -> dict[str, str]:
        place, options = READERS[reader]
        if (reader, indexed) not in seen:
            options = options | (dict(index_dir=str(trees / 'index')) if indexed else {})
            seen[reader, indexed] = content_of(trees / place, **options)
        return seen[reader, indexed]
    return read


@pytest.mark.parametrize(('one', 'other'), itertools.combinations(READERS, 2), ids=' and '.join)
@pytest.mark.parametrize('indexed', [False, True], ids=['', 'index'])
def test_readers_agree(one, other, indexed, found):
    ours, theirs = found(one, indexed), found(other, not indexed)
    assert ours == theirs


def test_what_they_agree_on(found):
    assert found('folder', False) == WANTED
    assert list(found('folder', True)) == sorted(WANTED)
    assert list(found('list', True)) == list(WANTED)


@pytest.mark.parametrize('reader', ['folder', 'tar-gnu.tar', 'python-posix.tar'])
@pytest.mark.parametrize('index_dir', [None, 'kept'])
def test_what_is_not_there_is_told(reader, index_dir, trees, tmp_path, warned):
    place, options = READERS[reader]
    for _ in range(2):
        content_of(trees / place, index_dir=index_dir and str(tmp_path / index_dir), **options)
    dead, gif = warned[:2]
    assert warned == [dead, gif] * 2
    assert f"has {len(DEAD)} links that lead nowhere, the first being 'back': what they stand for is lost" in dead
    assert 'not taken, 1 .gif' in gif


def test_links_in_circles_have_an_end(tmp_path):
    """Twelve folders, each with links to all: 12! ways."""
    write(tmp_path, *(f'{i}/{i}.jpg' for i in range(12)))
    for i, j in itertools.product(range(12), repeat=2):
        os.symlink(f'../{j}', tmp_path / f'{i}/to {j}')
    assert len(content_of(tmp_path)) == len(list(walk(str(tmp_path)))) - 1 == 12


def test_a_folder_elsewhere_goes_by_its_first_link(tmp_path):
    write(tmp_path / 'else', 'deep/1.jpg', '2.jpg')
    root = write(tmp_path / 'root', '3.jpg')
    for name, target in (('z', 'else/deep'), ('b', 'else'), ('c', 'else/deep')):
        os.symlink(tmp_path / target, root / name)
    assert list(content_of(root)) == ['3.jpg', 'b/2.jpg', 'b/deep/1.jpg']


# ---- archives that are not of a tree

def add(archive: tarfile.TarFile, name: str, content: str | None = None, **facts) -> None:
    member = tarfile.TarInfo(name)
    for fact, value in facts.items():
        setattr(member, fact, value)
    content = os.fsencode(name if content is None else content) if member.isreg() else b''
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def joined(path: Path) -> None:
    """By cat: end marks are inside."""
    parts = []
    for name in ('a/1.jpg', '2.jpg', '3.jpg'):
        with tarfile.open(fileobj=(part := io.BytesIO()), mode='w') as archive:
            add(archive, name)
        parts.append(part.getvalue())
    path.write_bytes(b''.join(parts))


def appended(path: Path) -> None:
    """By tar -r: a file twice, with a hard link to its first version."""
    for content in ('old', 'new'):
        write(path.parent / 'files', '1.jpg', '3.jpg')
        (path.parent / 'files/1.jpg').unlink()
        (path.parent / 'files/1.jpg').write_text(content)
        if content == 'old':
            os.link(path.parent / 'files/1.jpg', path.parent / 'files/2.jpg')
            tar(path.parent / 'files', '-cf', str(path), '1.jpg', '2.jpg', '3.jpg')
        else:
            tar(path.parent / 'files', '-rf', str(path), '1.jpg')


def ways_of_writing(path: Path) -> None:
    with tarfile.open(path, 'w') as archive:
        for name in ('./1.jpg', 'a//2.jpg', 'a/./3.jpg', 'https://host/photos/4.jpg', 's3://bucket/5.jpg', '/6.jpg'):
            add(archive, name)
        add(archive, 'hard.jpg', type=tarfile.LNKTYPE, linkname='a/2.jpg')


def replaced(path: Path) -> None:
    """A link in the place of a file, and a file in that of a link."""
    with tarfile.open(path, 'w') as archive:
        for name in ('1.jpg', '2.jpg'):
            add(archive, name)
        add(archive, '1.jpg', type=tarfile.SYMTYPE, linkname='2.jpg')
        add(archive, '3.jpg', type=tarfile.SYMTYPE, linkname='2.jpg')
        add(archive, '3.jpg')


@pytest.mark.parametrize('make', [joined, appended, ways_of_writing, replaced])
def test_archives_are_read_as_they_unpack(make, tmp_path):
    make(tmp_path / 'one.tar')
    (tmp_path / 'unpacked').mkdir()
    tar(tmp_path, '-xf', 'one.tar', '-C', 'unpacked', '--ignore-zeros')
    found = content_of(tmp_path, shards='one.tar')
    assert found == content_of(tmp_path / 'unpacked') and len(found) >= 3


def test_sparse_files_and_links_out_of_an_archive_are_told(tmp_path, warned):
    write(tmp_path, '1.jpg', '2.jpg', '3.jpg')
    with (tmp_path / '2.jpg').open('r+b') as file:
        file.truncate(2 ** 20)
    os.link(tmp_path / '1.jpg', tmp_path / '0.jpg')
    tar(tmp_path, '--sparse', '-cf', 'all.tar', '0.jpg', '1.jpg', '2.jpg', '3.jpg')
    tar(tmp_path, '--delete', '-f', 'all.tar', '0.jpg')  # leaves the link to it
    assert list(content_of(tmp_path, shards='all.tar')) == ['3.jpg']
    (told,) = warned
    assert "all.tar has 2 images that are sparse, or links to what is not in it, the first being '1.jpg'" in told


def test_images_of_one_name_are_told(tmp_path, warned):
    appended(tmp_path / 'one.tar')
    content_of(tmp_path, shards='one.tar')
    (told,) = warned
    assert "has 1 images more than once under one name, the first being '1.jpg': the last one counts" in told


@pytest.mark.parametrize('rest', [b'\1' * 700, b'\0' * 512 + b'garbage'])
def test_what_follows_an_end_mark_and_is_no_archive_is_told(rest, tmp_path, warned):
    joined(tmp_path / 'one.tar')
    with (tmp_path / 'one.tar').open('ab') as file:
        file.write(rest)
    assert len(content_of(tmp_path, shards='one.tar')) == 3
    assert len(warned) == 1 and 'one.tar is damaged or cut off at byte' in warned[0]


@pytest.mark.parametrize(('name', 'links', 'end'), [
    ('a/b', {}, 'a/b'), ('a/b', {'a': 'c/d'}, 'c/d/b'), ('a', {'a': './/b/../c'}, 'c'), ('a', {'a': '/b'}, None),
    ('a', {'a': '../b'}, None), ('a', {'a': 'b', 'b': 'a'}, None), ('a/b', {'a': 'x/y', 'x/y/b': '../z'}, 'x/z'),
    ('a', {'a': '.'}, '')])
def test_where_a_link_leads(name, links, end):
    assert follow(name, links) == end


# ---- lists

def test_list_of_another_encoding(tmp_path):
    write(tmp_path, '1.jpg')
    (tmp_path / 'list.txt').write_text('1.jpg\n', encoding='utf-16')
    with pytest.raises(ValueError, match='list.txt has bytes that no path has: save it as plain text in UTF-8'):
        content_of(tmp_path, ann_file='list.txt')


def test_lists_of_one_name_in_two_places(tmp_path, monkeypatch):
    """A relative path means another file in another working directory: so has its index to."""
    write(tmp_path / 'images', '0.jpg', '1.jpg')
    for name in ('0', '1'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'list.txt').write_text(f'{name}.jpg\n')
        monkeypatch.chdir(tmp_path / name)
        dataset = ImageFiles(data_prefix=str(tmp_path / 'images'), ann_file='list.txt',
                             index_dir=str(tmp_path / 'kept'))
        assert dataset.get_data_info(0)['img_path'] == str(tmp_path / f'images/{name}.jpg')


# ---- changes

def old(*paths: Path) -> None:
    """Of a time that no change will have: the system's clock may stand still for some ms."""
    for path in paths:
        os.utime(path, ns=(0, 0))


def test_images_that_come_after_the_look(tmp_path, monkeypatch):
    """Two folders get an image each when they have been looked into: none is missing afterwards."""
    root, options = write(tmp_path / 'root', 'a/0.jpg', 'b/0.jpg'), dict(index_dir=str(tmp_path / 'index'))
    old(root / 'a', root / 'b')
    encode = image_index.encode
    with monkeypatch.context() as patch:
        patch.setattr(image_index, 'encode', lambda lines: write(root, 'a/1.jpg', 'b/1.jpg') and encode(lines))
        with pytest.raises(ValueError, match='root/[ab] has changed while the images of .*root/ were being listed'):
            content_of(root, **options)
    assert len(content_of(root, **options)) == 4


@pytest.mark.parametrize(('look', 'options'), [
    ('os.scandir', {}), ('pathlib.Path.read_bytes', dict(ann_file='list.txt')),
    ('adala_mm.datasets.image_index.expand_shards', dict(shards='*.tar')),
    ('adala_mm.datasets.image_index.scan_shard', dict(shards='0.tar'))])
@pytest.mark.parametrize('index_dir', [None, 'index'])
def test_growing_while_it_is_read(look, options, index_dir, tmp_path, monkeypatch):
    root = write(tmp_path / 'root', '0.jpg')
    (root / 'list.txt').write_text('0.jpg\n')
    joined(root / '0.tar')
    old(root)
    name, attribute = look.rsplit('.', 1)
    real = getattr(pkgutil.resolve_name(name), attribute)

    def grow(*args):
        found = real(*args)
        result = list(found) if look == 'os.scandir' else found
        write(root, '1.jpg')
        shutil.copy(root / '0.tar', root / '1.tar')
        for grown, more in (('list.txt', b'1.jpg\n'), ('0.tar', bytes(512))):
            with (root / grown).open('ab') as file:
                file.write(more)
        return result
    monkeypatch.setattr(look, grow)
    with pytest.raises(ValueError, match='has changed while the images of'):
        content_of(root, index_dir=index_dir and str(tmp_path / index_dir), **options)


def test_a_change_whose_time_is_turned_back(tmp_path):
    """As by rsync -a and tar -x, which restore the times of folders."""
    root, options = write(tmp_path / 'root', '0.jpg'), dict(index_dir=str(tmp_path / 'index'))
    old(root)
    assert len(content_of(root, **options)) == 1
    before = root.stat().st_ctime_ns
    write(root, '1.jpg')
    while root.stat().st_ctime_ns == before or root.stat().st_mtime_ns:  # until the clock has gone on
        old(root)
    assert len(content_of(root, **options)) == 2


@pytest.mark.parametrize(('age', 'images'), [(1, 2), (3, 1)])
def test_a_change_in_the_same_tick(age, images, tmp_path, monkeypatch):
    """It leaves the stamp as it was: an index of files that were that young is not used again."""
    monkeypatch.setattr(image_index, 'TICK', 2 * 10 ** 9)
    monkeypatch.setattr(image_index.time, 'time_ns', lambda: 10 ** 18)
    for module in ('datasets.image_index', 'utils.folders'):
        monkeypatch.setattr(f'adala_mm.{module}.stamp_of', lambda path: [0, 10 ** 18 - age * 10 ** 9, 0])
    root, options = write(tmp_path / 'root', '0.jpg'), dict(index_dir=str(tmp_path / 'index'))
    content_of(root, **options)
    write(root, '1.jpg')
    assert len(content_of(root, **options)) == images


def test_a_shard_in_a_new_folder(tmp_path):
    options = dict(shards='a/day*/*.tar', index_dir=str(tmp_path / 'index'))
    for day in (1, 2):
        write(tmp_path, f'a/day{day}/{day}.jpg')
        tar(tmp_path / f'a/day{day}', '-cf', '0.tar', f'{day}.jpg')
        assert len(content_of(tmp_path, **options)) == day


def test_index_in_the_folder_that_it_is_of(tmp_path):
    with pytest.raises(ValueError, match='has changed .* keep what runs write .*index_dir. out of there'):
        content_of(write(tmp_path, '0.jpg'), index_dir=str(tmp_path / 'work_dirs/index'))


def test_folder_of_a_long_name(tmp_path):
    root = write(tmp_path / ('ä' * 120), '0.jpg')
    assert len(content_of(root, index_dir=str(tmp_path / 'index'))) == 1


# ---- processes

def one_of_two(rank: int, place: Path, index_dir: str | None) -> None:
    """The second process has its own copy of the folder, with an image more."""
    torch.distributed.init_process_group('gloo', f'file://{place}/meeting', rank=rank, world_size=2)
    os.chdir(place / str(rank))
    with pytest.raises(ValueError, match='processes 1 list other images of images than process 0: give all machines'):
        load_index(Source('images', '', '', ('.jpg',)), index_dir)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('index_dir', [None, 'index'])
def test_processes_that_see_other_images(index_dir, tmp_path):
    write(tmp_path, '0/images/0.jpg', '1/images/0.jpg', '1/images/1.jpg')
    assert exit_codes(one_of_two, tmp_path, index_dir) == [0, 0]


def test_names_are_told_as_they_can_be_printed(tmp_path, warned):
    os.symlink('nowhere', write(tmp_path, '0.jpg') / BYTES)
    content_of(tmp_path)
    assert re.search(r"the first being '\\udcff\\udcfe.jpg'", warned[0]) and warned[0].isprintable()
