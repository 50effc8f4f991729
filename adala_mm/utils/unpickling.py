"""Reads pickles without the means to run code: nothing that this machine can hold can be called.

A pickle is a program: it names functions and calls them. Here a name is a word (`Name`), which stands for one of
`MAKERS`. These check every argument, and give tensors, numbers, strings, containers, and numpy's arrays of numbers and
strings. Whatever else a pickle asks for is refused by its name.
"""
from __future__ import annotations

import math
import pickletools
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

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
# Python 2, whose names torch.save writes, and numpy 1 have other names for the same.
RENAMED = (('__builtin__.', 'builtins.'), ('numpy.core.', 'numpy._core.'))
# What torch.save writes. The arguments of others are not even read: some have a little language of their own.
OPCODES = {opcode.code.encode('latin-1'): opcode for opcode in pickletools.opcodes if opcode.name in (
    'PROTO STOP MARK GLOBAL REDUCE NEWOBJ BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE '
    'BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 '
    'EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET').split()}
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


class Machine:
    """Executes one pickle.

    Args:
        file: where the pickle begins; it is read up to its end.
        size: bytes of the whole file. What is copied from one object into another is bounded by it, so that a short
            pickle cannot fill the memory.
        take: gives the bytes of a storage by key, number of bytes and location (``cuda:0``).
    """

    def __init__(self, file: BinaryIO, size: int, take: Callable[[str, int, str], torch.UntypedStorage] | None = None):
        self.file, self.take = file, take
        self.left = 4 * size  # an honest pickle copies what it holds twice: text to bytes, bytes to an array
        self.stack, self.below, self.memo = [], [], {}

    def load(self) -> Any:
        """The object.

        Raises:
            Refused: if it needs more than this machine can make, with the name of it.
            Exception: of any kind, for a pickle that is damaged.
        """
        while code := self.file.read(1):
            if code not in OPCODES:
                other = [known.name for known in pickletools.opcodes if known.code == code.decode('latin-1')]
                check(other, f'its pickle has the unknown opcode {code!r}')
                raise Refused(f'the pickle opcode {other[0]}, which torch.save does not write')
            opcode = OPCODES[code]
            if opcode.name == 'STOP':
                return as_value(self.stack.pop())
            self.step(opcode.name, opcode.arg and opcode.arg.reader(self.file))
        raise ValueError('its pickle has no end')

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case 'BINPUT' | 'LONG_BINPUT':
                self.memo[argument] = stack[-1]
            case 'BINGET' | 'LONG_BINGET':
                stack.append(self.memo[argument])
            case ('BINUNICODE' | 'BININT' | 'BININT1' | 'BININT2' | 'BINFLOAT' | 'LONG1' | 'NONE'
                  | 'SHORT_BINSTRING' | 'BINSTRING'):
                stack.append(argument)
            case 'NEWTRUE' | 'NEWFALSE':
                stack.append(opcode == 'NEWTRUE')
            case 'MARK':
                self.below.append(stack)
                self.stack = []
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                count = int(opcode[-1])
                check(len(stack) >= count, 'its pickle has too short a stack')
                stack[-count:] = [self.grouped(stack[-count:])]
            case 'TUPLE':
                items = self.marked()
                self.stack.append(self.grouped(items))
            case 'EMPTY_TUPLE':
                stack.append(())
            case 'EMPTY_LIST':
                stack.append([])
            case 'EMPTY_DICT':
                stack.append({})
            case 'EMPTY_SET':
                stack.append(set())
            case 'APPEND' | 'APPENDS':
                items = self.marked() if opcode == 'APPENDS' else [stack.pop()]
                check(type(self.stack[-1]) is list, f'{opcode} to a {type(self.stack[-1]).__name__}')
                self.stack[-1].extend(map(as_value, items))
            case 'SETITEM' | 'SETITEMS':
                items = self.marked() if opcode == 'SETITEMS' else [stack.pop(-2), stack.pop()]
                target = self.stack[-1]
                check(type(target) in (dict, OrderedDict, Counter), f'{opcode} of a {type(target).__name__}')
                for name, item in zip(items[::2], items[1::2], strict=True):
                    target[as_key(name)] = as_value(item)
            case 'GLOBAL':
                stack.append(self.named(argument.replace(' ', '.')))
            case 'BINPERSID':
                stack.append(self.storage(stack.pop()))
            case 'REDUCE' | 'NEWOBJ':
                arguments, called = stack.pop(), stack.pop()
                stack.append(self.made(called, arguments, MAKERS if opcode == 'REDUCE' else CLASSES))
            case 'BUILD':
                state = stack.pop()
                self.build(stack[-1], state)
            case 'PROTO':
                pass

    def marked(self) -> list:
        items, self.stack = self.stack, self.below.pop()
        return items

    def grouped(self, items: list) -> tuple:
        return (Arguments if any(type(item) in (Name, Storage, Arguments) for item in items) else tuple)(items)

    def spend(self, count: int) -> None:
        """Takes ``count`` bytes, or objects, from what the file may become."""
        self.left -= count
        check(self.left >= 0, 'it is of contents far larger than the file, such as one value that is repeated: save '
              'clones of expanded tensors')

    def spend_on(self, *items: Any) -> None:
        self.spend(sum(len(item) for item in items if isinstance(item, (str, bytes, tuple, list, dict))))

    def named(self, path: str) -> Any:
        for old, new in RENAMED:
            path = new + path.removeprefix(old) if path.startswith(old) else path
        if path in DTYPES:
            return DTYPES[path]
        if path in MAKERS or path in CLASSES or path in STORAGES or path == ARRAY:
            return Name(path)
        raise Refused(path)

    def storage(self, pid: Any) -> Storage:
        check(isinstance(pid, tuple) and len(pid) > 4 and pid[0] == 'storage' and not any(pid[5:]), 'a storage without '
              'a name')
        kind, name, location, count = pid[1:5]
        if type(kind) is not Name or kind.path not in STORAGES:
            raise Refused(f'a storage of {getattr(kind, "path", kind)}')
        check(type(name) is str and type(location) is str and type(count) is int and count >= 0 and self.take,
              'a storage without a size')
        dtype = STORAGES[kind.path]
        return Storage(dtype, self.take(name, count * dtype.itemsize, location))

    def made(self, called: Any, arguments: Any, makers: dict[str, Callable]) -> Any:
        if type(called) is not Name or called.path not in makers:
            raise Refused(f'a call of {called.path if type(called) is Name else type(called).__name__}')
        check(isinstance(arguments, tuple), f'{called.path} is called without arguments')
        self.spend_on(*arguments)
        try:
            result = makers[called.path](*arguments)
        except Refused:
            raise
        except Exception as error:
            raise ValueError(f'{called.path}: {error}') from error
        if isinstance(result, Tensor) and result.nbytes > result.untyped_storage().nbytes():
            self.spend(result.nbytes)  # one value, seen many times
        return result

    def build(self, made: Any, state: Any) -> None:
        self.spend_on(*state) if isinstance(state, tuple) else self.spend_on(state)
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
