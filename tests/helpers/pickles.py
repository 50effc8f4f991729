"""Pickles, piece by piece: each function gives the code that leaves one object on the stack."""
from __future__ import annotations

import pickle
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import torch

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


BIG = 1 << 40
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
