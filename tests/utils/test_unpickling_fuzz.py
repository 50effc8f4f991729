"""Whatever a checkpoint says: data come out, or one message. A fuzzer."""
from __future__ import annotations

import collections
import io
import os
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.logging import HistoryBuffer

from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.pickle_makers import CLASSES, DTYPES, MAKERS, STORAGES
from helpers.pickles import (
    BIG,
    BUFFER,
    FALSE,
    NONE,
    OF_NUMPY,
    OF_TORCH,
    TRUE,
    VALUES,
    array,
    built,
    call,
    dict_of,
    dtype,
    list_of,
    name,
    new,
    number,
    numbers,
    raw,
    storage,
    text,
    tuple_of,
    write,
)

EXAMPLES = int(os.environ.get('FUZZ', 0))  # `make test-fuzz`: new ones, in place of the same few hundred
few = settings(max_examples=EXAMPLES or 150, derandomize=not EXAMPLES, deadline=None, database=None)
# torch's own list has more than ours, and the rest stands for all that is on neither.
OTHER_NAMES = ['torch.Tensor', 'torch.nn.parameter.Parameter', 'torch.serialization._get_layout',
               'torch._tensor._rebuild_from_type_v2', f'{OF_TORCH}._rebuild_wrapper_subclass',
               f'{OF_TORCH}._rebuild_sparse_tensor', f'{OF_TORCH}._rebuild_qtensor', 'numpy.ndarray', 'numpy.memmap',
               'numpy.core.multiarray.scalar', 'numpy.f2py.crackfortran.myeval', 'builtins.eval', 'posix.system',
               'pathlib.Path.touch', 'collections.deque', 'torch.load', 'pickle.loads']
KNOWN_NAMES = [*MAKERS, *CLASSES, *STORAGES, 'numpy.ndarray', *list(DTYPES)[:6]]


def mostly(good: st.SearchStrategy, bad: st.SearchStrategy) -> st.SearchStrategy:
    """Pickles of which all is wrong end at their first mistake, and show nothing of what comes after it."""
    return st.sampled_from([good] * 5 + [bad]).flatmap(lambda items: items)


names = st.one_of(st.sampled_from(KNOWN_NAMES), st.sampled_from(OTHER_NAMES)).map(name)
counts = mostly(st.integers(0, 4), st.sampled_from([-1, 40, BIG, -BIG, 1 << 62, 1 << 63, 1 << 70]))
shapes = mostly(st.sampled_from([(), (0,), (1,), (2,), (4,), (2, 2), (1, 3)]), st.lists(counts, max_size=3)).map(
    lambda values: numbers(*values))
contents = st.sampled_from([0, 2, 4, 8, 16]).map(lambda count: raw(bytes(range(count))))
words = st.sampled_from(['min', 'mean', 'update', '__init__', '__globals__', 'tofile', '_metadata', '__class__', 'f4',
                         'O', 'latin1', '|', 'max_length', '_log_history', 'storage', 'cpu', 'cuda:0', '0']).map(text)
atoms = st.one_of(counts.map(number), st.floats().map(number), st.sampled_from([NONE, TRUE, FALSE]), contents, words)
refs = st.integers(0, 4).map(lambda at: pickle.BINGET + bytes([at]))
storages = st.builds(storage, mostly(st.just(4), counts), mostly(st.just('0'), st.sampled_from(['1', 'x'])),
                     mostly(st.just('torch.FloatStorage'), st.sampled_from([*STORAGES, 'numpy.ndarray'])))
kinds = mostly(st.sampled_from(['f4', 'f8', 'i2', 'b1', 'U2']), st.sampled_from(['O', 'V8', 'M8', 'f4,O', 'm']))
owners = st.sampled_from([BUFFER, 'numpy.ndarray', 'numpy.dtype', 'collections.OrderedDict', 'torch.Tensor'])


@st.composite
def tensors(draw) -> bytes:
    function = draw(st.sampled_from(['_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3']))
    size, stride = draw(mostly(st.sampled_from([((4,), (1,)), ((), ()), ((2, 2), (2, 1)), ((3,), (0,)), ((0,), (1,))]),
                               st.tuples(*[st.lists(counts, max_size=2)] * 2)))
    parts = [draw(storages), number(draw(mostly(st.just(0), counts))), numbers(*size), numbers(*stride)]
    extra = [] if function == '_rebuild_tensor' else [draw(st.sampled_from([TRUE, FALSE])), pickle.EMPTY_DICT]
    last = [name(draw(mostly(st.just('torch.float32'), st.sampled_from(list(DTYPES)))))] if function[-1] == '3' else []
    made = call(f'{OF_TORCH}.{function}', *parts, *extra, *last)
    return draw(mostly(st.just(made), st.just(call(f'{OF_TORCH}._rebuild_parameter', made, TRUE, NONE))))


@st.composite
def dtypes(draw) -> bytes:
    made = call('numpy.dtype', text(draw(kinds)))
    state = [number(3), draw(mostly(st.sampled_from([text('<'), text('|')]), atoms)), NONE,
             draw(mostly(st.just(NONE), st.just(tuple_of(text('a'))))), draw(mostly(st.just(NONE), atoms)), number(-1),
             number(-1), draw(atoms)]
    return draw(st.sampled_from([made, built(made, tuple_of(*state))]))


@st.composite
def arrays(draw) -> bytes:
    if draw(st.booleans()):
        return call(f'{OF_NUMPY}.scalar', draw(dtypes()), draw(mostly(contents, atoms)))
    return array(draw(shapes), draw(dtypes()), draw(mostly(contents, st.just(list_of(NONE)))))


@st.composite
def buffers(draw) -> bytes:
    histories = mostly(st.just(array(numbers(2), dtype('f8'), raw(bytes(16)))), st.one_of(arrays(), atoms))
    state = [text('max_length'), number(draw(counts)), text('_log_history'), draw(histories), text('_count_history'),
             draw(histories), text('statistics_methods'), dict_of(text('min'), draw(atoms))]
    return built(new(BUFFER), dict_of(*state[draw(mostly(st.just(0), st.just(2))):]))


# What a forger would try with these names: classes called, methods asked for, states of one's own.
forgeries = st.one_of(
    st.builds(call, st.just('numpy.ndarray'), shapes, kinds.map(text)),
    st.builds(call, st.just('numpy.ndarray'), shapes, st.just(text('O')), contents.map(
        lambda content: call('builtins.bytearray', content))),
    st.builds(new, st.just('numpy.ndarray'), shapes, kinds.map(text)),
    st.builds(call, st.just('numpy.dtype'), st.sampled_from(['O', 'V8', 'f4,O']).map(text)),
    st.builds(call, st.just('builtins.getattr'), mostly(st.just(BUFFER), owners).map(name), words),
    st.builds(lambda owner, content: call(f'{OF_NUMPY}._reconstruct', name(owner), numbers(2), content), owners,
              st.sampled_from([raw(b'b'), raw(b'O'), text('O')])),
    st.builds(call, st.sampled_from(['builtins.bytearray', 'torch.Tensor', 'torch.storage.UntypedStorage']),
              counts.map(number)),
    st.builds(built, st.one_of(tensors(), arrays(), dtypes(), buffers(), st.just(call('collections.OrderedDict'))),
              st.builds(dict_of, words, atoms)),
    st.builds(new, owners), owners.map(name), st.builds(lambda path, part: call(path, part), owners, atoms))


def larger(items: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    some = st.lists(items, max_size=3)
    return st.one_of(
        some.map(lambda parts: tuple_of(*parts)), some.map(lambda parts: list_of(*parts)),
        st.lists(st.tuples(atoms, items).map(b''.join), max_size=3).map(lambda parts: dict_of(*parts)),
        st.builds(lambda thing, at: thing + pickle.BINPUT + bytes([at]), items, st.integers(0, 4)),
        mostly(items, st.one_of(
            st.builds(lambda path, parts: call(path, *parts), st.sampled_from(KNOWN_NAMES), some),
            st.builds(lambda path, parts: new(path, *parts), st.sampled_from(KNOWN_NAMES), some),
            st.builds(lambda thing, parts: thing + tuple_of(*parts) + pickle.REDUCE, items, some),
            st.builds(built, items, items), items.map(lambda thing: thing + pickle.BINPERSID), names, refs,
            st.binary(min_size=1, max_size=3))))


things = st.one_of(tensors(), arrays(), buffers(), forgeries, atoms)
programs = st.one_of(forgeries, st.recursive(things, larger, max_leaves=5))
watched: list[str] | None = None


def watch(event: str, arguments: tuple) -> None:
    """Nothing is imported, opened, compiled or started while a checkpoint is read, but the file itself."""
    if watched is not None and event.partition('.')[0] in ('import', 'exec', 'compile', 'os', 'subprocess', 'socket',
                                                          'shutil', 'ctypes', 'marshal', 'code', 'pickle'):
        watched.append(f'{event}{arguments}')


sys.addaudithook(watch)
PLAIN = {type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device}


def assert_data(found, size: int) -> None:
    """``found`` is made of tensors, numbers, strings, containers and numeric arrays, no larger than a file of ``size``
    bytes may become."""
    todo, seen, tensors_in = [found], {}, {}
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        kind = type(item)
        if kind in (torch.Tensor, torch.nn.Parameter):
            content = item.untyped_storage()
            tensors_in[content.data_ptr()] = content.nbytes()
            assert item.numel() == 0 or 0 <= item.storage_offset() and sum(
                (n - 1) * s for n, s in zip(item.shape, item.stride(), strict=True)
            ) + item.storage_offset() < content.nbytes() // item.dtype.itemsize
            assert item.nbytes <= 4 * size and not item._backward_hooks and set(vars(item)) <= {'_backward_hooks'}
            item.detach().clone()  # it can be read
        elif isinstance(item, (np.ndarray, np.generic)):
            assert item.dtype.kind in 'biufcSU' and item.nbytes <= 4 * size
            assert kind is np.ndarray or kind.__module__ == 'numpy'
            item.copy()
        elif isinstance(item, np.dtype):
            assert item.kind in 'biufcSU' and item == np.dtype(item.str)
        elif kind is HistoryBuffer:
            assert set(vars(item)) <= {'max_length', '_log_history', '_count_history'}
            todo += vars(item).values()
        elif kind in (dict, OrderedDict, Counter):
            todo += [*item.keys(), *item.values()]
            if kind is OrderedDict:
                assert set(vars(item)) <= {'_metadata'}
                todo += vars(item).values()
        elif kind in (list, tuple, set, frozenset):
            todo += item
        else:
            assert kind in PLAIN, kind
    assert sum(tensors_in.values()) <= size


def outside() -> dict:
    """What a pickle could reach without opening a file."""
    return dict(statistics=HistoryBuffer._statistics_methods.copy(), buffer=vars(HistoryBuffer).copy(),
                modules=len(sys.modules), environment=dict(os.environ), path=list(sys.path), makers=MAKERS.copy(),
                functions=[(vars(maker).copy(), maker.__code__, maker.__defaults__) for maker in MAKERS.values()],
                f4=(np.dtype('f4').str, np.dtype('f4').metadata), threads=torch.get_num_threads(),
                default=torch.get_default_dtype(), grad=torch.is_grad_enabled())


outcomes = collections.Counter()


def assert_harmless(path: Path) -> None:
    global watched
    before, watched, files = outside(), [], sorted(path.parent.iterdir())
    try:
        found = load_checkpoint(path)
    except ValueError as error:
        outcomes['refused'] += 1
        assert str(error).startswith(f'cannot read the checkpoint {path}: ') and '\n' not in str(error)
    else:
        outcomes['read'] += 1
        assert_data(found, path.stat().st_size)
    finally:
        happened, watched = watched, None
    assert happened == [] and outside() == before and sorted(path.parent.iterdir()) == files


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """A folder; what the first checkpoint and the first log buffer of a process set up is there."""
    HistoryBuffer()
    folder = tmp_path_factory.mktemp('fuzz')
    torch.save(VALUES, folder / 'a.pth')
    load_checkpoint(folder / 'a.pth')
    load_checkpoint(write(folder / 'a.pth', NONE))
    return folder


@few
@given(program=programs)
def test_any_program_is_refused_or_makes_data(program, place):
    assert_harmless(write(place / 'a.pth', program, {'0': bytes(16), '1': bytes(64)}))


def pieces_of(content: bytes) -> list[bytes]:
    """The opcodes of a pickle, with their arguments."""
    import pickletools
    at = [position for _, _, position in pickletools.genops(content)]
    return [content[a:b] for a, b in zip(at, [*at[1:], len(content)], strict=True)]


@pytest.fixture(scope='module')
def genuine(place) -> tuple[list[bytes], dict[str, bytes], bytes]:
    """Opcodes and storages of a checkpoint of torch.save, and an old file with the same contents."""
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    state = dict(message_hub=dict(log_scalars={'train/loss': buffer}, best=np.float64(0.5), seen=np.arange(3)),
                 optimizer=torch.optim.Adam(torch.nn.Linear(2, 2).parameters()).state_dict(),
                 state_dict=torch.nn.BatchNorm1d(2).state_dict(), meta=dict(epoch=1, when={1, 2}, raw=b'\xff'))
    torch.save(state, path := place / 'genuine.pth')
    torch.save(state, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path) as archive:
        contents = {entry.filename.partition('/data/')[2]: archive.read(entry) for entry in archive.infolist()}
        program = archive.read('genuine/data.pkl')
    return pieces_of(program), {key: content for key, content in contents.items() if key}, old.getvalue()


places = st.floats(0, 1, exclude_max=True)
changes = st.lists(st.one_of(
    st.tuples(st.just('drop'), places, places), st.tuples(st.just('swap'), places, places),
    st.tuples(st.just('copy'), places, places), st.tuples(st.just('put'), places, st.one_of(atoms, names, programs))),
    min_size=1, max_size=4)


@few
@given(changes=changes)
def test_a_changed_checkpoint_is_refused_or_makes_data(changes, genuine, place):
    pieces, contents, _ = genuine
    pieces = list(pieces)
    for kind, where, other in changes:
        at = 1 + int(where * (len(pieces) - 2))
        if kind == 'put':
            pieces[at:at + 1] = [other]
            continue
        to = 1 + int(other * (len(pieces) - 2))
        if kind == 'drop':
            del pieces[at]
        elif kind == 'swap':
            pieces[at], pieces[to] = pieces[to], pieces[at]
        else:
            pieces.insert(at, pieces[to])
    assert_harmless(write(place / 'a.pth', b''.join(pieces[1:])[:-1], contents))


@few
@given(changes=st.lists(st.tuples(places, st.binary(max_size=3)), min_size=1, max_size=4))
def test_a_damaged_old_file_is_refused_or_makes_data(changes, genuine, place):
    content = bytearray(genuine[2])
    for where, new_bytes in changes:
        at = int(where * len(content))
        content[at:at + max(1, len(new_bytes))] = new_bytes
    (place / 'a.pth').write_bytes(content)
    assert_harmless(place / 'a.pth')


def test_the_fuzzer_meets_both():
    """Last in this file: programs that are all refused at their first opcode would show nothing."""
    assert not outcomes or min(outcomes['read'], outcomes['refused']) > 30, outcomes
