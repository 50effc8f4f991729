"""Reads pickles without the means to run code: nothing that this machine can hold can be called.

A pickle is a program: it names functions and calls them. Here a name is only a word (`Name`), and `Machine` gives the
arguments to the one of `adala_mm.utils.pickle_makers.MAKERS` that the word stands for.
"""
from __future__ import annotations

import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch import Tensor

from adala_mm.utils.pickle_makers import (
    ARRAY,
    CLASSES,
    DTYPES,
    MAKERS,
    STORAGES,
    Arguments,
    Name,
    Refused,
    Storage,
    as_key,
    as_value,
    check,
    set_state,
)

# Python 2, whose names torch.save writes, and numpy 1 have other names for the same.
RENAMED = (('__builtin__.', 'builtins.'), ('numpy.core.', 'numpy._core.'))
# What torch.save writes. The arguments of others are not even read: some have a little language of their own.
OPCODES = {opcode.code.encode('latin-1'): opcode for opcode in pickletools.opcodes if opcode.name in (
    'PROTO STOP MARK GLOBAL REDUCE NEWOBJ BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE '
    'BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 '
    'EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET').split()}


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
        set_state(made, state)
