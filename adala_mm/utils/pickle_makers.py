"""What a pickle may make: each name that it may use stands for one of `MAKERS`, which check all their arguments.

They give tensors, numbers, strings, containers, and numpy's arrays of numbers and strings. `Refused` names whatever
else a pickle asks for.
"""
from __future__ import annotations

import math
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from torch import Tensor

ARRAY, BUFFER = 'numpy.ndarray', 'mmengine.logging.history_buffer.HistoryBuffer'
STATISTICS = ('min', 'max', 'mean', 'current')
NUMPY_DTYPE = re.compile(r'b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU]\d+')
DTYPES = {f'torch.{name}': value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
STORAGES = {f'torch.{name}Storage': dtype for name, dtype in dict(
    Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
    Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool,
    ComplexDouble=torch.complex128, ComplexFloat=torch.complex64).items()}
STORAGES['torch.storage.UntypedStorage'] = torch.uint8
OTHER_ORDER = 'it is of a machine with another byte order'
KEYS = (str, bytes, int, float, complex, type(None), np.generic, torch.dtype, torch.device)


class Refused(ValueError):
    """What a pickle asks for that is no data."""


@dataclass(frozen=True)
class Name:
    """A global that a pickle names: a word."""

    path: str


@dataclass(frozen=True)
class Storage:
    """Bytes that tensors are views of."""

    dtype: torch.dtype
    data: torch.UntypedStorage


class Arguments(tuple):
    """A tuple with a `Name` or a `Storage` in it, which are for makers alone."""


def as_value(item: Any) -> Any:
    """``item``, which has to be data."""
    if type(item) is Name:
        raise Refused(f'{item.path} as a value')
    if type(item) in (Storage, Arguments):
        raise Refused('a storage or a class as a value')
    return item


def as_key(item: Any) -> Any:
    """``item``, which has to be a plain value, or a tuple of such: Python takes the hash of tuples in tuples without an
    end, until its stack is full."""
    if not (isinstance(item, KEYS) or isinstance(item, (tuple, frozenset)) and all(isinstance(i, KEYS) for i in item)):
        raise Refused(f'a {type(item).__name__} as a key')
    return item


def check(fact: Any, fault: str) -> None:
    if not fact:
        raise ValueError(fault)


def is_size(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) <= 64 and all(type(n) is int and 0 <= n < 2 ** 48 for n in item)


def ordered_dict(pairs: list = ()) -> OrderedDict:
    return OrderedDict((as_key(name), as_value(item)) for name, item in pairs)


def counter(counts: dict) -> Counter:
    check(type(counts) is dict, 'no counts')
    return Counter(counts)


def set_of(items: list = ()) -> set:
    return set(map(as_key, items))


def encoded(text: str, encoding: str) -> bytes:
    """The bytes that protocol 2 writes as text."""
    check(type(text) is str and encoding in ('latin1', 'latin-1'), f'{encoding!r} is no encoding of bytes')
    return text.encode('latin-1')


def no_bytes() -> bytes:
    return b''


def changeable_bytes(content: bytes = b'') -> bytearray:
    check(type(content) is bytes, 'no bytes')
    return bytearray(content)


def complex_number(real: float, imaginary: float) -> complex:
    check(type(real) is type(imaginary) is float, 'no floats')
    return complex(real, imaginary)


def statistic(owner: Any, name: Any) -> str:
    """A method of MMEngine's log buffers is its name, which `fill_buffer` has no use for: every buffer has the four."""
    if owner != Name(BUFFER) or name not in STATISTICS:
        raise Refused(f'{getattr(owner, "path", owner)}.{name}, which no training checkpoint needs')
    return name


def torch_size(numbers: tuple) -> torch.Size:
    check(is_size(numbers), f'{numbers} is no size')
    return torch.Size(numbers)


def device(kind: str, index: int | None = None) -> torch.device:
    check(type(kind) is str and type(index) in (int, type(None)), 'no device')
    return torch.device(kind) if index is None else torch.device(kind, index)


def tensor(storage: Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool = False, hooks: Any = None,
           metadata: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """A view of ``storage`` that stays within it."""
    check(type(storage) is Storage, 'a tensor without a storage')
    if hooks or metadata:
        raise Refused('a tensor with hooks or marks')
    dtype = dtype or storage.dtype
    check(is_size(size) and is_size(stride) and len(size) == len(stride) and is_size((offset,)),
          f'a tensor has the size {size}, the strides {stride} and the offset {offset}')
    end = offset + (1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0)
    there = storage.data.nbytes() // dtype.itemsize
    check(math.prod(size) < 2 ** 48, f'a tensor has the size {tuple(size)}')
    check(end <= there, f'a tensor of size {tuple(size)} needs {end} values of a storage that has {there}')
    made = torch.empty(0, dtype=dtype, device=storage.data.device).set_(storage.data, offset, size, stride)
    return made.requires_grad_() if requires_grad else made


def typed_tensor(storage: Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: Any,
                 dtype: torch.dtype, metadata: Any = None) -> Tensor:
    check(isinstance(dtype, torch.dtype), 'a tensor without a dtype')
    return tensor(storage, offset, size, stride, requires_grad, hooks, metadata, dtype)


def parameter(data: Tensor, requires_grad: bool, hooks: Any) -> torch.nn.Parameter:
    check(isinstance(data, Tensor) and not hooks, 'a parameter without a tensor')
    return torch.nn.Parameter(data, bool(requires_grad))


def numpy_dtype(name: str, align: bool = False, copy: bool = True) -> np.dtype:
    if type(name) is not str or not NUMPY_DTYPE.fullmatch(name):
        raise Refused(f'the numpy.dtype {name!r}, which is neither of numbers nor of strings')
    return np.dtype(name)


def check_dtype(made: np.dtype, state: tuple) -> None:
    """All of ``state`` but the byte order follows from the name."""
    check(isinstance(state, tuple) and len(state) == 8 and type(state[1]) is str, 'numpy.dtype has an unknown state')
    if state[2:5] != (None, None, None):
        raise Refused('a numpy.dtype with fields')
    check(state[1] in ('|', '=', '<' if sys.byteorder == 'little' else '>'),
          OTHER_ORDER)


def content_of(text: bytes | str) -> bytes:
    return text.encode('latin-1') if type(text) is str else text  # Python 2 has one type for both


def scalar(dtype: np.dtype, content: bytes) -> np.generic:
    content = content_of(content)
    check(isinstance(dtype, np.dtype) and type(content) is bytes and len(content) == dtype.itemsize,
          'a number has not the bytes of its dtype')
    return np.ndarray((), dtype, content)[()]


def array(owner: Any, shape: Any, typecode: Any) -> np.ndarray:
    """An empty array, which `fill_array` gives its contents."""
    if owner != Name(ARRAY):
        raise Refused(f'an array of {getattr(owner, "path", owner)}')
    return np.empty(0)


def fill_array(made: np.ndarray, state: tuple) -> None:
    _, shape, dtype, fortran, content = state
    content = content_of(content)
    check(isinstance(dtype, np.dtype) and is_size(shape) and type(content) is bytes
          and len(content) == dtype.itemsize * math.prod(shape), f'an array has not the bytes of {dtype} and {shape}')
    made.__setstate__((1, tuple(shape), dtype, bool(fortran), content))


def new_buffer() -> HistoryBuffer:
    return HistoryBuffer()


def fill_buffer(made: HistoryBuffer, state: dict) -> None:
    """Sets the numbers. MMEngine's own way writes into the class what the file says."""
    wanted = dict(max_length=int, _log_history=np.ndarray, _count_history=np.ndarray)
    check(type(state) is dict and all(type(state.get(name)) is kind for name, kind in wanted.items()),
          'a log buffer without its history')
    if extra := state.keys() - wanted.keys() - {'statistics_methods'}:
        raise Refused(f'a log buffer with {min(map(str, extra))}')
    made.__dict__.update((name, state[name]) for name in wanted)


def note_metadata(made: OrderedDict, state: dict) -> None:
    """What ``state_dict`` notes of modules: their versions, and the position grid of this package's ViT."""
    check(type(state) is dict, 'an OrderedDict has an unknown state')
    if extra := state.keys() - {'_metadata'}:
        raise Refused(f'an OrderedDict with the attribute {min(map(str, extra))}')
    if '_metadata' in state:
        notes = state['_metadata']
        check(isinstance(notes, dict) and all(type(name) is str and type(note) is dict for name, note in notes.items()),
              'the notes on modules are none')
        made._metadata = notes


def set_state(made: Any, state: Any) -> None:
    """Gives ``made`` the state that the pickle has for it."""
    if isinstance(made, np.ndarray):
        fill_array(made, state)
    elif isinstance(made, np.dtype):
        check_dtype(made, state)
    elif type(made) is HistoryBuffer:
        fill_buffer(made, state)
    elif type(made) is OrderedDict:
        note_metadata(made, state)
    else:
        raise Refused(f'a {type(made).__name__} with a state of its own')


MAKERS: dict[str, Callable] = {
    'collections.OrderedDict': ordered_dict,
    'collections.Counter': counter,
    'builtins.set': set_of,
    'builtins.frozenset': lambda items=(): frozenset(set_of(items)),
    'builtins.bytes': no_bytes,
    'builtins.bytearray': changeable_bytes,
    'builtins.complex': complex_number,
    'builtins.getattr': statistic,
    '_codecs.encode': encoded,
    'torch.Size': torch_size,
    'torch.device': device,
    'torch._utils._rebuild_tensor': tensor,
    'torch._utils._rebuild_tensor_v2': tensor,
    'torch._utils._rebuild_tensor_v3': typed_tensor,
    'torch._utils._rebuild_parameter': parameter,
    'numpy.dtype': numpy_dtype,
    'numpy._core.multiarray.scalar': scalar,
    'numpy._core.multiarray._reconstruct': array,
}
CLASSES: dict[str, Callable] = {BUFFER: new_buffer}
