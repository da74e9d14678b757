"""What CIFAR's Python files hold, read without Python's pickle.

A pickle is a program for a small machine, and one of its instructions calls any function of any
module. This is that machine without the instruction: it knows dicts, lists, tuples, texts, numbers
and NumPy arrays of bytes, calls nothing, and refuses the rest by name. Long strings stay in the
file and are given as places in it, so that a data set is not held in memory.

Protocols 2 to 5 are read; CIFAR's files are of protocol 2, written by Python 2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

_LONG_STRING = 65_536
_MAX_HELD = 64_000_000
"""Bytes of short strings, together; CIFAR-100 has 2 MB of file names."""
_MAX_INSTRUCTIONS = 4_000_000
"""CIFAR-100 takes 300,000."""


class PickleRefusedError(ValueError):
    """The file is cut, or holds what such a file has no business to hold."""


@dataclass(frozen=True, slots=True)
class LongString:
    """A string that stays where it is."""

    offset: int
    length: int


@dataclass(slots=True)
class PickledArray:
    """A NumPy array by its parts."""

    shape: tuple[int, ...] = ()
    dtype: str = ""
    fortran: bool = False
    data: LongString | str | None = None
    """Bytes as they lie in memory."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A function or class that the file names; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_KNOWN_NAMES = frozenset(
    [
        *(_Name(module, "_reconstruct") for module in _MULTIARRAY),
        *(_Name(module, "_frombuffer") for module in _NUMERIC),
        _Name("numpy", "ndarray"),
        _Name("numpy", "dtype"),
    ]
)
_MARK = object()


def read_pickle(file: BinaryIO, offset: int, length: int) -> Any:
    """What a pickle holds: texts and bytes alike as `str` or `LongString`.

    Args:
        file: holds it.
        offset: where it begins.
        length: its bytes; what lies behind is not read.

    Raises:
        PickleRefusedError: it is cut, or not of the kind above.
        OSError: the storage fails.
    """
    machine = _Machine(file, offset, offset + length)
    try:
        return machine.run()
    except PickleRefusedError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise PickleRefusedError(f"the pickle is broken near byte {machine.at:,}") from error


class _Machine:
    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file = file
        self._end = end
        self.at = start
        self._held = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        file.seek(start)

    def run(self) -> Any:
        for _ in range(_MAX_INSTRUCTIONS):
            code = self._read(1)
            if code == b".":
                return self._stack.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise PickleRefusedError(
                    f"the pickle holds instruction {code!r}, which the files of CIFAR do not need"
                )
            instruction(self)
        raise PickleRefusedError(f"the pickle has more than {_MAX_INSTRUCTIONS:,} instructions")

    def _read(self, num_bytes: int) -> bytes:
        data = self._file.read(min(num_bytes, self._end - self.at))
        self.at += len(data)
        if len(data) < num_bytes:
            raise PickleRefusedError("the pickle is cut short")
        return data

    def _unsigned(self, num_bytes: int) -> int:
        return int.from_bytes(self._read(num_bytes), "little")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_signed(self, num_bytes: int) -> None:
        self.push(int.from_bytes(self._read(num_bytes), "little", signed=True))

    def push_unsigned(self, num_bytes: int) -> None:
        self.push(self._unsigned(num_bytes))

    def push_long(self) -> None:
        self.push_signed(self._unsigned(1))

    def push_string(self, length_bytes: int) -> None:
        length = self._unsigned(length_bytes)
        if length > self._end - self.at:
            raise PickleRefusedError("the pickle is cut short")
        if length > _LONG_STRING:
            self.push(LongString(self.at, length))
            self.at += length
            self._file.seek(self.at)
            return
        self._held += length
        if self._held > _MAX_HELD:
            raise PickleRefusedError(f"the pickle has more than {_MAX_HELD:,} bytes of texts")
        self.push(self._read(length).decode("utf-8", "surrogateescape"))

    def push_name(self) -> None:
        module, name = (self._line(), self._line())
        self._push_known(_Name(module, name))

    def name_from_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_known(_Name(str(module), str(name)))

    def _push_known(self, name: _Name) -> None:
        if name not in _KNOWN_NAMES:
            raise PickleRefusedError(
                f"the pickle asks for {str(name)!r:.200}; only arrays of numpy are read, and "
                "nothing is ever called"
            )
        self.push(name)

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            if len(line) > 200:
                raise PickleRefusedError("the pickle has a name of more than 200 characters")
            line += self._read(1)
        return line[:-1].decode("utf-8", "replace")

    def skip(self, num_bytes: int) -> None:
        self._read(num_bytes)

    def remember(self, num_bytes: int) -> None:
        self._memo[self._unsigned(num_bytes) if num_bytes else len(self._memo)] = self._stack[-1]

    def recall(self, num_bytes: int) -> None:
        self.push(self._memo[self._unsigned(num_bytes)])

    def _since_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise IndexError
        found = self._stack[place + 1 :]
        del self._stack[place:]
        return found

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        found = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        self.push(tuple(found))

    def tuple_since_mark(self) -> None:
        self.push(tuple(self._since_mark()))

    def append(self) -> None:
        value = self._stack.pop()
        self._list().append(value)

    def append_all(self) -> None:
        values = self._since_mark()
        self._list().extend(values)

    def _list(self) -> list[Any]:
        found = self._stack[-1]
        if not isinstance(found, list):
            raise TypeError
        return found

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def set_items(self) -> None:
        self._set(self._since_mark())

    def _set(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str):
                raise PickleRefusedError("the pickle has a key that is no text")
            target[key] = value

    def make(self) -> None:
        """Where pickle would call a function, this makes one of two things that it knows."""
        arguments, what = self._stack.pop(), self._stack.pop()
        if not isinstance(what, _Name):
            raise TypeError
        if what == _Name("numpy", "dtype"):
            self.push(_Dtype(str(arguments[0])))
        elif what.name == "_reconstruct":
            self.push(PickledArray())
        elif what.name == "_frombuffer":
            data, dtype, shape, order = arguments
            self.push(PickledArray())
            _set_parts(self._stack[-1], shape, dtype, order == "F", data)
        else:
            raise PickleRefusedError(f"the pickle calls {what}")

    def fill(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, _Dtype):
            return  # byte order and the like, which bytes do not have
        if not isinstance(target, PickledArray):
            raise TypeError
        *_, shape, dtype, fortran, data = state
        _set_parts(target, shape, dtype, bool(fortran), data)


def _set_parts(array: PickledArray, shape: Any, dtype: Any, fortran: bool, data: Any) -> None:
    if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
        raise TypeError
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise TypeError
    array.shape, array.dtype, array.fortran, array.data = shape, dtype.name, fortran, data


def _do(method: Callable[..., None], *arguments: Any) -> Callable[[_Machine], None]:
    return lambda machine: method(machine, *arguments)


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _do(_Machine.skip, 1),  # protocol
    b"\x95": _do(_Machine.skip, 8),  # frame
    b"(": lambda machine: machine.push(_MARK),
    b"N": lambda machine: machine.push(None),
    b"\x88": lambda machine: machine.push(True),
    b"\x89": lambda machine: machine.push(False),
    b"}": lambda machine: machine.push({}),
    b"]": lambda machine: machine.push([]),
    b")": lambda machine: machine.push(()),
    b"J": _do(_Machine.push_signed, 4),
    b"K": _do(_Machine.push_unsigned, 1),
    b"M": _do(_Machine.push_unsigned, 2),
    b"\x8a": _do(_Machine.push_long),
    b"G": _do(_Machine.push_unsigned, 8),  # a float, which nothing here looks at
    b"U": _do(_Machine.push_string, 1),
    b"T": _do(_Machine.push_string, 4),
    b"X": _do(_Machine.push_string, 4),
    b"\x8c": _do(_Machine.push_string, 1),
    b"\x8d": _do(_Machine.push_string, 8),
    b"C": _do(_Machine.push_string, 1),
    b"B": _do(_Machine.push_string, 4),
    b"\x8e": _do(_Machine.push_string, 8),
    b"\x96": _do(_Machine.push_string, 8),  # bytearray
    b"c": _do(_Machine.push_name),
    b"\x93": _do(_Machine.name_from_stack),
    b"q": _do(_Machine.remember, 1),
    b"r": _do(_Machine.remember, 4),
    b"\x94": _do(_Machine.remember, 0),
    b"h": _do(_Machine.recall, 1),
    b"j": _do(_Machine.recall, 4),
    b"\x85": _do(_Machine.tuple_of, 1),
    b"\x86": _do(_Machine.tuple_of, 2),
    b"\x87": _do(_Machine.tuple_of, 3),
    b"t": _do(_Machine.tuple_since_mark),
    b"a": _do(_Machine.append),
    b"e": _do(_Machine.append_all),
    b"s": _do(_Machine.set_item),
    b"u": _do(_Machine.set_items),
    b"R": _do(_Machine.make),
    b"b": _do(_Machine.fill),
}
