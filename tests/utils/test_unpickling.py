"""Whatever a checkpoint says: data come out, or one message. Forged pickles, and sizes that lie."""
from __future__ import annotations

import json
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.torch_files import read_torch_file
from helpers.pickles import (
    BIG,
    BUFFER,
    FALSE,
    NONE,
    OF_NUMPY,
    OF_TORCH,
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


def tensor(count: int, offset: int, size: tuple, stride: tuple, **options) -> bytes:
    return call(f'{OF_TORCH}._rebuild_tensor_v2', storage(count, **options), number(offset), numbers(*size),
                numbers(*stride), FALSE, call('collections.OrderedDict'))


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
