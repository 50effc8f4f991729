"""Whatever a checkpoint says: data come out, or one message. Forged pickles, sizes that lie, and a fuzzer."""
from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
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
from adala_mm.utils.torch_files import read_torch_file

# --- pickles, piece by piece: each of these is the code that leaves one object on the stack ---------------------------

OF_NUMPY, OF_TORCH = 'numpy._core.multiarray', 'torch._utils'
BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'
NONE, TRUE, FALSE = pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE


def text(content: str) -> bytes:
    encoded = content.encode()
    return pickle.BINUNICODE + struct.pack('<I', len(encoded)) + encoded


def number(value: int | float) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name(path: str) -> bytes:
    return pickle.GLOBAL + '\n'.join([*path.rsplit('.', 1), '']).encode()


def tuple_of(*items: bytes) -> bytes:
    return pickle.MARK + b''.join(items) + pickle.TUPLE


def list_of(*items: bytes) -> bytes:
    return pickle.EMPTY_LIST + pickle.MARK + b''.join(items) + pickle.APPENDS


def dict_of(*items: bytes) -> bytes:
    """Keys and values in turn."""
    return pickle.EMPTY_DICT + pickle.MARK + b''.join(items) + pickle.SETITEMS


def call(path: str, *arguments: bytes) -> bytes:
    return name(path) + tuple_of(*arguments) + pickle.REDUCE


def new(path: str, *arguments: bytes) -> bytes:
    return name(path) + tuple_of(*arguments) + pickle.NEWOBJ


def built(thing: bytes, state: bytes) -> bytes:
    return thing + state + pickle.BUILD


def raw(content: bytes) -> bytes:
    return call('_codecs.encode', text(content.decode('latin-1')), text('latin1'))


def numbers(*values: int) -> bytes:
    return tuple_of(*map(number, values))


def storage(count: int, key: str = '0', kind: str = 'torch.FloatStorage') -> bytes:
    return tuple_of(text('storage'), name(kind), text(key), text('cpu'), number(count)) + pickle.BINPERSID


def tensor(count: int, offset: int, size: tuple, stride: tuple, **options) -> bytes:
    return call(f'{OF_TORCH}._rebuild_tensor_v2', storage(count, **options), number(offset), numbers(*size),
                numbers(*stride), FALSE, call('collections.OrderedDict'))


def dtype(kind: str, *state: bytes) -> bytes:
    made = call('numpy.dtype', text(kind), FALSE, TRUE)
    return built(made, tuple_of(*state)) if state else made


def array(shape: bytes, of: bytes, content: bytes) -> bytes:
    empty = call(f'{OF_NUMPY}._reconstruct', name('numpy.ndarray'), numbers(0), raw(b'b'))
    return built(empty, tuple_of(number(1), shape, of, FALSE, content))


def write(path: Path, program: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A file as of ``torch.save`` whose object is what ``program`` leaves; 4 floats are in its storage 0."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', pickle.PROTO + b'\2' + program + pickle.STOP)
        archive.writestr('archive/byteorder', sys.byteorder)
        archive.writestr('archive/version', '3')
        for key, content in ({'0': bytes(16)} if storages is None else storages).items():
            archive.writestr(f'archive/data/{key}', content)
    return path


# --- what is no data --------------------------------------------------------------------------------------------------

def test_the_pieces_make_what_torch_makes(tmp_path):
    """The refusals below are not due to pieces that no loader would read."""
    parts = dict(tensor=tensor(4, 1, (3,), (1,)), array=array(numbers(2), dtype('f4'), raw(bytes(8))),
                 scalar=call(f'{OF_NUMPY}.scalar', dtype('i8'), raw(bytes(8))))
    path = write(tmp_path / 'a.pth', dict_of(*(part for key, code in parts.items() for part in (text(key), code))))
    ours, theirs = load_checkpoint(path), torch.load(path, weights_only=False)
    assert torch.equal(ours['tensor'], theirs['tensor']) and ours['tensor'].shape == (3,)
    assert ours['array'].tolist() == theirs['array'].tolist() == [0, 0] and ours['scalar'] == theirs['scalar'] == 0


EMPTY = call(f'{OF_NUMPY}._reconstruct', name('numpy.ndarray'), numbers(0), raw(b'b'))
FORGED = {
    'an array at an address': (call('numpy.ndarray', numbers(1), text('O'), call('builtins.bytearray', raw(bytes(8)))),
                               'a call of numpy.ndarray'),
    'an array of any size': (call('numpy.ndarray', numbers(1 << 40)), 'a call of numpy.ndarray'),
    'a new array': (new('numpy.ndarray', numbers(1), text('O')), 'a call of numpy.ndarray'),
    'an array by its class': (call(f'{OF_NUMPY}._reconstruct', name(BUFFER), numbers(0), raw(b'b')), 'an array of mm'),
    'objects': (array(numbers(1), dtype('O'), list_of(NONE)), "numpy.dtype 'O'"),
    'fields': (dtype('V16', number(3), text('|'), NONE, tuple_of(text('a')), dict_of(), number(16), number(1),
                     number(0)), "numpy.dtype 'V16'"),
    'fields in the state': (dtype('f8', number(3), text('|'), NONE, tuple_of(text('a')), dict_of(), number(8),
                                  number(1), number(0)), 'numpy.dtype with fields'),
    'a dtype of text': (dtype('f8,O'), "numpy.dtype 'f8,O'"),
    'a dtype of a list': (call('numpy.dtype', list_of(tuple_of(text('a'), text('O')))), 'numpy.dtype'),
    'a class as a dtype': (call('numpy.dtype', name('numpy.ndarray')), 'numpy.dtype'),
    'dates': (dtype('M8'), "numpy.dtype 'M8'"),
    'a log buffer of objects': (built(new(BUFFER), dict_of(text('evil'), number(1))), 'a log buffer without'),
    'a log buffer with more': (built(new(BUFFER), dict_of(
        text('max_length'), number(1), text('_log_history'), EMPTY, text('_count_history'), EMPTY, text('mean'),
        number(1))), 'a log buffer with mean'),
    'a log buffer, called': (call(BUFFER, list_of(), list_of()), f'a call of {BUFFER}'),
    'a log buffer of a size': (new(BUFFER, list_of(number(1)), list_of(number(1))), BUFFER),
    'a method of a log buffer': (call('builtins.getattr', name(BUFFER), text('register_statistics')),
                                 'register_statistics, which no training checkpoint needs'),
    'a method of an array': (call('builtins.getattr', name('numpy.ndarray'), text('min')), 'ndarray.min, which no'),
    'a method of a method': (call('builtins.getattr', call('builtins.getattr', name(BUFFER), text('min')),
                                  text('__globals__')), '__globals__'),
    'a class': (name('numpy.ndarray'), 'numpy.ndarray as a value'),
    'a function in a list': (list_of(name('builtins.getattr')), 'builtins.getattr as a value'),
    'a function in a tuple': (tuple_of(tuple_of(name('builtins.getattr'))), 'a class as a value'),
    'a function in a dict': (dict_of(text('a'), name('builtins.getattr')), 'builtins.getattr as a value'),
    'a function in an OrderedDict': (call('collections.OrderedDict', tuple_of(tuple_of(
        text('a'), name('builtins.getattr')))), 'builtins.getattr as a value'),
    'a function in a set': (call('builtins.set', list_of(name('builtins.getattr'))), 'builtins.getattr as a value'),
    'a storage': (storage(4), 'a storage or a class as a value'),
    'a call of data': (text('print') + tuple_of() + pickle.REDUCE, 'a call of str'),
    'a dict with a state': (built(dict_of(), dict_of(text('a'), number(1))), 'a dict with a state'),
    'a tensor with a state': (built(tensor(4, 0, (4,), (1,)), numbers(1)), 'a Tensor with a state'),
    'a class with a state': (built(name('numpy.ndarray'), dict_of(text('a'), number(1))), 'a Name with a state'),
    'a shadowed method': (built(call('collections.OrderedDict'), dict_of(text('items'), number(1))),
                          'OrderedDict with the attribute items'),
    'hooks': (call(f'{OF_TORCH}._rebuild_tensor_v2', storage(4), number(0), numbers(4), numbers(1), FALSE,
                   dict_of(number(1), number(1))), 'a tensor with hooks'),
    'a tensor by its class': (call('torch.Tensor', number(1 << 40)), 'torch.Tensor'),
    'a type of tensor': (call('torch._tensor._rebuild_from_type_v2', name('numpy.ndarray')), '_rebuild_from_type_v2'),
    'a wrapper': (call(f'{OF_TORCH}._rebuild_wrapper_subclass'), '_rebuild_wrapper_subclass'),
    'a storage of bytes': (call('torch.storage.UntypedStorage', number(1 << 40)), 'a call of torch.storage.Untyped'),
    'a storage of objects': (storage(4, kind='numpy.ndarray'), 'a storage of numpy.ndarray'),
    'code': (call('builtins.eval', text('1')), r'\(builtins.eval\)'),
    'a shell': (call('posix.system', text('true')), r'\(posix.system\)'),
    'a module': (name('numpy.core.multiarray'), r'numpy\._?core\.multiarray'),
    'an instance of protocol 0': (pickle.MARK + text('a') + pickle.INST + b'numpy\nndarray\n', 'opcode INST'),
    'a class of protocol 1': (pickle.MARK + name('numpy.ndarray') + pickle.OBJ, 'opcode OBJ'),
    'a name from the stack': (text('posix') + text('system') + pickle.STACK_GLOBAL, 'opcode STACK_GLOBAL'),
    'keywords': (name('numpy.ndarray') + tuple_of() + dict_of() + pickle.NEWOBJ_EX, 'opcode NEWOBJ_EX'),
    'tuples without an end as a key': (pickle.EMPTY_DICT + b'(' + pickle.EMPTY_TUPLE + 200_000 * pickle.TUPLE1
                                       + NONE + pickle.SETITEMS, 'a tuple as a key'),
    'tuples without an end in a set': (call('builtins.set', list_of(pickle.EMPTY_TUPLE + 200_000 * pickle.TUPLE1)),
                                       'a tuple as a key'),
}


@pytest.mark.parametrize('kind', FORGED)
def test_what_is_no_data_is_refused_by_name(kind, tmp_path):
    program, message = FORGED[kind]
    path = write(tmp_path / 'a.pth', dict_of(text('a'), program))
    with pytest.raises(ValueError, match=message) as info:
        load_checkpoint(path)
    assert str(info.value).startswith(f'cannot read the checkpoint {path}: it ')
    assert len(str(info.value).splitlines()) == 1 and len(str(info.value)) < 1000


def test_no_object_comes_from_an_address(tmp_path):
    """`numpy.ndarray` of objects, over bytes of the file's choice: the object whose address they are, or a crash."""
    secret = object()
    path = write(tmp_path / 'a.pth', call('numpy.ndarray', numbers(1), text('O'), call(
        'builtins.bytearray', raw(struct.pack('P', id(secret))))))
    assert torch.load(path, weights_only=False)[0] is secret  # the attack is real
    with pytest.raises(ValueError, match='never unpickled here .a call of numpy.ndarray'):
        load_checkpoint(path)


def test_a_log_buffer_changes_nothing_of_its_class(tmp_path):
    """MMEngine's own way of reading one writes the methods of the file into the class, for all buffers."""
    torch.save({'a': HistoryBuffer([1.0, 3.0], [1, 1])}, tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
        program = archive.read('a/data.pkl')
    swapped = program.replace(text('max'), text('mex')).replace(text('min'), text('max')).replace(
        text('mex'), text('min'))
    assert swapped != program
    before = HistoryBuffer._statistics_methods.copy()
    buffer = load_checkpoint(write(tmp_path / 'b.pth', swapped[2:-1]))['a']
    assert HistoryBuffer._statistics_methods == before
    assert type(buffer) is HistoryBuffer and buffer.mean() == 2 and buffer.statistics('max') == 3


# --- sizes ------------------------------------------------------------------------------------------------------------

BIG = 1 << 40
LIES = {
    'a long storage': (tensor(BIG, 0, (BIG,), (1,)), 'archive/data/0 has 16 bytes, not 4398046511104'),
    'a short storage': (tensor(3, 0, (3,), (1,)), 'archive/data/0 has 16 bytes, not 12'),
    'no storage': (tensor(4, 0, (4,), (1,), key='1'), 'archive/data/1'),
    'a size': (tensor(4, 0, (5,), (1,)), r'size \(5,\) needs 5 values of a storage that has 4'),
    'a large size': (tensor(4, 0, (BIG,), (1,)), f'needs {BIG} values of a storage that has 4'),
    'strides': (tensor(4, 0, (2, 2), (3, 1)), 'needs 5 values'),
    'an offset': (tensor(4, 1, (4,), (1,)), 'needs 5 values'),
    'a negative offset': (tensor(4, -1, (1,), (1,)), 'the offset -1'),
    'a negative size': (tensor(4, 0, (-1,), (1,)), r'the size \(-1,\)'),
    'a negative stride': (tensor(4, 3, (2,), (-1,)), r'the strides \(-1,\)'),
    'a negative storage': (tensor(-4, 0, (0,), (1,)), 'a storage without a size'),
    'more sizes than strides': (tensor(4, 0, (2, 2), (1,)), r'the strides \(1,\)'),
    'one value, seen often': (tensor(4, 0, (BIG,), (0,)), 'far larger than the file'),
    'one value, seen too often': (tensor(4, 0, (BIG, BIG, BIG), (0, 0, 0)), 'has the size'),
    'another dtype': (call(f'{OF_TORCH}._rebuild_tensor_v3', storage(16, kind='torch.storage.UntypedStorage'),
                           number(0), numbers(4), numbers(1), FALSE, NONE, name('torch.float64')),
                      r'needs 4 values of a storage that has 2'),
    'bytes': (call('builtins.bytearray', number(BIG)), 'builtins.bytearray: no bytes'),
    'bytes, copied often': (raw(bytes(1 << 20)) + pickle.BINPUT + b'\0' + pickle.EMPTY_LIST + 10000 * (
        name('builtins.bytearray') + pickle.BINGET + b'\0' + pickle.TUPLE1 + pickle.REDUCE + pickle.APPEND),
        'far larger than the file'),
    'an array': (array(numbers(BIG), dtype('f4'), raw(bytes(4))), r'not the bytes of float32 and \(1099511627776,\)'),
    'a negative array': (array(numbers(-1), dtype('f4'), raw(b'')), 'not the bytes'),
    'a short array': (array(numbers(2), dtype('f4'), raw(bytes(4))), 'not the bytes'),
    'a scalar': (call(f'{OF_NUMPY}.scalar', dtype('f8'), raw(bytes(4))), 'not the bytes of its dtype'),
    'a list as a size': (call('torch.Size', list_of(number(1))), 'is no size'),
}


@pytest.mark.parametrize('kind', LIES)
def test_sizes_that_the_file_has_not_are_refused(kind, tmp_path):
    program, message = LIES[kind]
    with pytest.raises(ValueError, match=message) as info:
        load_checkpoint(write(tmp_path / 'a.pth', dict_of(text('a'), program)))
    assert 'trust' not in str(info.value)  # it could not help


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path, monkeypatch):
    write(tmp_path / 'a.pth', tensor(1 << 20, 0, (1 << 20,), (1,)), {'0': bytes(4 << 20)})
    with zipfile.ZipFile(tmp_path / 'a.pth') as source, zipfile.ZipFile(tmp_path / 'b.pth', 'w',
                                                                        zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert torch.load(tmp_path / 'b.pth').numel() == 1 << 20  # torch takes it
    assert (tmp_path / 'b.pth').stat().st_size < 20_000
    monkeypatch.setattr(torch, 'empty', lambda *args, **kwargs: pytest.fail('memory was taken'))
    with pytest.raises(ValueError, match=r'it is compressed, as torch.save never does it: .* unzip it, and zip it ag'):
        load_checkpoint(tmp_path / 'b.pth')


def test_entries_over_one_another_are_refused(tmp_path):
    """Two names for the same bytes: a file could be its own size many times over."""
    content = write(tmp_path / 'a.pth', tensor(25000, 0, (25000,), (1,)), {
        '0': bytes(100_000), '1': bytes(100_000)}).read_bytes()
    at = content.index(b'archive/data/1') - 30
    before = content.index(b'archive/data/0') - 30
    directory = content.rindex(b'archive/data/1') - 46
    twin = bytearray(content)
    twin[directory + 42:directory + 46] = struct.pack('<I', before)
    length = 30 + len('archive/data/1') + 100_000
    del twin[at:at + length]
    end = twin.rindex(b'PK\5\6')
    twin[end + 16:end + 20] = struct.pack('<I', twin.index(b'PK\1\2'))
    path = tmp_path / 'b.pth'
    path.write_bytes(twin)
    with zipfile.ZipFile(path) as archive:
        assert sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size
    with pytest.raises(ValueError, match='compressed'):
        load_checkpoint(path)


def old_file(program: bytes, keys: list[str], content: bytes) -> bytes:
    """As of ``torch.save`` before PyTorch 1.6."""
    system = dict(protocol_version=1001, little_endian=sys.byteorder == 'little', type_sizes=dict(short=2))
    parts = (torch.serialization.MAGIC_NUMBER, 1001, system)
    return b''.join([*(pickle.dumps(part, 2) for part in parts), pickle.PROTO + b'\2' + program + pickle.STOP,
                     pickle.dumps(keys, 2), content])


def old_tensor(count: int) -> bytes:
    stored = tuple_of(text('storage'), name('torch.FloatStorage'), text('0'), text('cpu'), number(count), NONE)
    return call(f'{OF_TORCH}._rebuild_tensor_v2', stored + pickle.BINPERSID, number(0), numbers(count), numbers(1),
                FALSE, call('collections.OrderedDict'))


@pytest.mark.parametrize(('count', 'keys', 'content', 'message'), [
    (4, ['0'], struct.pack('<q4f', 4, 1, 2, 3, 4), None),
    (BIG, ['0'], struct.pack('<q4f', BIG, 1, 2, 3, 4), 'bytes are fewer than those of its tensors'),
    (4, ['0'], struct.pack('<q4f', BIG, 1, 2, 3, 4), f'storage 0 has {BIG} values'),
    (4, ['0'], struct.pack('<q3f', 4, 1, 2, 3), 'ends too early'),
    (4, [], b'', 'list of storages is another'),
    (4, ['0', '1'], struct.pack('<q4f', 4, 1, 2, 3, 4), 'list of storages is another'),
], ids=['whole', 'large', 'other', 'short', 'unread', 'more'])
def test_sizes_in_an_old_file(count, keys, content, message, tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(old_file(old_tensor(count), keys, content))
    if message is None:
        assert load_checkpoint(path).tolist() == torch.load(path).tolist() == [1, 2, 3, 4]
    else:
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path)


def test_an_old_file_that_is_a_tar_archive_too(tmp_path):
    """torch unpacks those into a folder, by the names in them, and asks for the pickles in them."""
    header = bytearray(pickle.dumps(torch.serialization.MAGIC_NUMBER, 2).ljust(512, b'\0'))
    header[124:136], header[148:156] = b'00000000000\0', b' ' * 8
    header[148:156] = f'{sum(header):06o}\0 '.encode()
    (tmp_path / 'a.pth').write_bytes(header + bytes(1024))
    with pytest.raises(ValueError, match='truncated or damaged'):
        load_checkpoint(tmp_path / 'a.pth')


@pytest.mark.parametrize(('shape', 'span'), [([BIG], [0, 16]), ([4], [0, 4 * BIG]), ([-4], [0, 16]), ([2], [0, 16])])
def test_sizes_in_safetensors(shape, span, tmp_path):
    header = json.dumps({'a': dict(dtype='F32', shape=shape, data_offsets=span)}).encode()
    (tmp_path / 'a.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(16))
    with pytest.raises(ValueError, match='truncated or damaged'):
        load_checkpoint(tmp_path / 'a.safetensors')


# --- what torch.save writes -------------------------------------------------------------------------------------------

VALUES = dict(
    none=None, truth=True, whole=-3, long=2 ** 80, real=0.5, complex=1 + 2j, text='ü', bytes=b'\xff\0', no_bytes=b'',
    bytearray=bytearray(b'abc'), tuple=(1, ('a', (2,))), list=[1, [2]], dict={1: 2, 'a': {}, (0, 1): 3, None: 4},
    set={1, 'a'}, frozenset=frozenset([1]), ordered=OrderedDict(a=1), counter=Counter(a=2),
    size=torch.Size([1, 2]), dtype=torch.bfloat16, device=torch.device('cuda', 1), numpy_dtype=np.dtype('f4'),
    scalar=np.float64(3), flag=np.bool_(True), word=np.str_('abc'), no_word=np.str_(''),
    array=np.arange(6).reshape(2, 3).T, nothing=np.zeros((0, 3), 'f2'), words=np.array(['a', 'bcd']),
    complexes=np.ones(2, 'c8'), tensor=torch.arange(12.).view(3, 4)[1:, 1:].T, zero_d=torch.tensor(3),
    empty=torch.zeros(0, 5), every_second=torch.arange(10)[::2], expanded=torch.ones(1).expand(7),
    parameter=torch.nn.Parameter(torch.ones(2)), half=torch.ones(2).half(), brain=torch.ones(2).bfloat16(),
    bits=torch.tensor([True]), waves=torch.ones(2, dtype=torch.complex64), unsigned=torch.ones(2, dtype=torch.uint16),
    eighth=torch.ones(2).to(torch.float8_e4m3fn), grad=torch.ones(2, requires_grad=True))


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'old'])
def test_what_torch_writes_comes_back(zipped, tmp_path):
    shared = torch.arange(4.)
    torch.save(VALUES | dict(one=shared, other=shared[1:]), tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    found = load_checkpoint(tmp_path / 'a.pth')
    assert found['one'].data_ptr() + 4 == found['other'].data_ptr()
    for key, wanted in VALUES.items():
        value = found[key]
        assert type(value) is type(wanted)
        if isinstance(wanted, torch.Tensor):
            assert (value.dtype, value.shape, value.stride(), value.requires_grad) == (
                wanted.dtype, wanted.shape, wanted.stride(), wanted.requires_grad)
            assert torch.equal(value.float() if value.dtype.itemsize == 1 else value,
                               wanted.float() if wanted.dtype.itemsize == 1 else wanted)
        elif isinstance(wanted, np.ndarray):
            assert value.dtype == wanted.dtype and np.array_equal(value, wanted)
        else:
            assert value == wanted


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'old'])
@pytest.mark.parametrize('place', ['cpu', torch.device('cpu'), None, {'cuda:0': 'cpu'}, lambda bytes_, place: bytes_,
                                   lambda bytes_, place: None, 'meta'],
                         ids=['name', 'device', 'none', 'dict', 'function', 'function of nothing', 'meta'])
def test_places_are_those_of_torch(place, zipped, tmp_path):
    torch.save({'a': torch.ones(3)}, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    ours, theirs = (read(tmp_path / 'a.pth', place)['a'] for read in (read_torch_file, torch.load))
    assert ours.device == theirs.device and (ours.is_meta or torch.equal(ours, theirs))


# --- the fuzzer -------------------------------------------------------------------------------------------------------

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
