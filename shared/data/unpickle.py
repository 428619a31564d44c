"""Pickles of images and labels, read by a machine that has no instruction to run anything.

A pickle is a program for a stack machine, and `pickle.load` lets it import and call. The machine
here knows the instructions of plain data (None, bool, int, str, bytes, list, tuple) and the seven
names by which numpy writes arrays, each replaced by a function of this file; the rest is refused.
Memory stays in proportion to the file: nothing is made before its bytes are known to be there.

Protocols 2 to 5. Python 2's str is bytes, as pickle's encoding="bytes" has it. The instructions are
described in the standard library's pickletools.
"""

from __future__ import annotations

import math
import os
import pickle  # for the names of the opcodes only
import pickletools
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO, Literal, NoReturn

import numpy as np

MOST_OPCODES = 1 << 23  # an image and its label take 3 as bytes, 40 as an array; 70 bytes each, say
LONGEST_NAME = 80  # of a module, and of a thing in it
OPCODE_NAMES = {op.code.encode("latin1"): op.name for op in pickletools.opcodes}
NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}  # never "O"
ORDERS: dict[str, Literal["|", "<", ">", "="]] = {"|": "|", "<": "<", ">": ">", "=": "="}


class _Refusal(ValueError):
    """A finding that reads as it is; other errors only say that the file is damaged."""


def _refuse(finding: str) -> NoReturn:
    raise _Refusal(finding)


def load(path: Path) -> Any:
    """What the pickle holds: None, bool, int, float, str, bytes, arrays, lists, tuples of these.

    Arrays are read-only views of their bytes, of a numeric dtype; numpy's scalars come as Python's,
    its dtypes as they are.
    Raises ValueError in one line, naming the file and the byte, for whatever else is asked for and
    for damage. Nothing that the file names is imported or called.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        machine = _Machine(file, os.fstat(file.fileno()).st_size)
        try:
            return machine.run()
        except _Refusal as error:
            finding = str(error)
        except (LookupError, TypeError, ValueError, OverflowError):
            finding = "not a pickle of images and labels, or a damaged one"
    raise ValueError(f"{path}: byte {machine.start:,}: {finding}; nothing was run, get a new copy")


class _Unfinished:
    """What numpy first makes and then completes with BUILD; `keys` are its places in the memo."""

    def __init__(self, value: np.dtype | None = None) -> None:
        self.value: np.dtype | np.ndarray | None = value
        self.keys: list[int] = []


class _Machine:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.at = self.start = self.frame_end = 0  # start: of the present opcode
        self.room = size  # bytes that calls may still make: real ones copy each byte once
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        if self.size < 2 or self.take(1) != pickle.PROTO or not 2 <= self.take(1)[0] <= 5:
            _refuse("not a pickle of protocol 2 to 5")
        for _ in range(MOST_OPCODES):
            self.start = self.at
            opcode = self.take(1)
            if opcode == pickle.STOP:
                break
            if opcode not in STEPS:
                _refuse(f"instruction {OPCODE_NAMES.get(opcode, opcode)} is not allowed")
            STEPS[opcode](self)
        else:
            _refuse(f"more than {MOST_OPCODES:,} instructions")
        if self.at != self.size:
            _refuse(f"ends here, but {self.size - self.at:,} bytes follow")
        if self.marks or len(self.stack) != 1:
            _refuse("ends with other than one object")
        return self.plain(self.stack)[0]

    def take(self, count: int) -> bytes:
        end = self.frame_end if self.at < self.frame_end else self.size
        if count > end - self.at:
            _refuse(f"{count:,} bytes announced, {end - self.at:,} there (cut short?)")
        self.at += count
        return self.file.read(count)

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def line(self) -> str:
        text = self.file.readline(LONGEST_NAME + 1)
        self.at += len(text)
        if not text.endswith(b"\n"):
            _refuse("a name without an end")
        return text[:-1].decode("ascii")

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return self.plain(items)

    def top(self, count: int) -> list[Any]:
        if count > len(self.stack):
            _refuse("takes more than there is")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return self.plain(items)

    def plain(self, items: list[Any]) -> list[Any]:
        """Items on their way into a list or tuple: data, and nothing that BUILD must finish."""
        for x in items:
            if type(x) is FunctionType or (type(x) is _Unfinished and x.value is None):
                _refuse("a function, or an array without its numbers, among the data")
        return [x.value if type(x) is _Unfinished else x for x in items]

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            _refuse("appends to something that is no list")
        self.stack[-1].extend(items)

    def remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1]
        if type(self.stack[-1]) is _Unfinished:
            self.stack[-1].keys.append(key)

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:  # hash() of a deep tuple can crash
            _refuse("a name that is no text")
        if (module, name) not in NAMES:
            _refuse(f"asks for {f'{module}.{name}'[:LONGEST_NAME]!r}, which is not allowed")
        self.stack.append(NAMES[module, name])

    def reduce(self) -> None:
        (arguments,) = self.top(1)
        function = self.stack.pop()
        if type(function) is not FunctionType or type(arguments) is not tuple:
            _refuse("calls something that is no function")
        made = function(*arguments)
        if type(made) is bytes:
            self.room -= len(made)
            if self.room < 0:
                _refuse("makes more bytes than the file has")
        self.stack.append(made)

    def build(self) -> None:
        (state,) = self.top(1)
        unfinished = self.stack[-1]
        if type(unfinished) is not _Unfinished or type(state) is not tuple:
            _refuse("sets the state of something that is no array")
        if isinstance(unfinished.value, np.dtype):
            _, order, *inner = state
            if any(part is not None for part in inner[:3]):
                _refuse("an array of records")
            if _text(order) not in ORDERS:
                _refuse("a byte order that numpy does not have")
            unfinished.value = unfinished.value.newbyteorder(ORDERS[_text(order)])
        elif unfinished.value is None:
            _, shape, dtype, fortran, data = state
            if type(fortran) is not bool:
                _refuse("an array of neither C nor Fortran order")
            unfinished.value = _array(data, dtype, shape, "F" if fortran else "C")
            # The array itself from here on: an image may stand in several pairs.
            self.stack[-1] = unfinished.value
            for key in unfinished.keys:
                self.memo[key] = unfinished.value


# -- what stands for numpy's names ---------------------------------------------------------------


def _reconstruct(kind: Any, *_: Any) -> _Unfinished:
    if _text(kind) != NDARRAY:
        _refuse("an array of a class other than numpy.ndarray")
    return _Unfinished()


def _dtype(name: Any, *_: Any) -> _Unfinished:
    if _text(name) not in NUMBERS:
        _refuse(f"an array of dtype {_text(name)[:20]!r}, only numbers are allowed")
    return _Unfinished(np.dtype(_text(name)))


def _scalar(dtype: Any, data: Any) -> bool | int | float:
    return _array(data, dtype, (1,)).item()


def _frombuffer(
    data: Any, dtype: Any, shape: Any, order: Any, axes: tuple[int, ...] | None = None
) -> np.ndarray:
    """numpy's own form of protocol 5; order "K" is a C array with its axes permuted."""
    if axes is None:
        return _array(data, dtype, shape, _text(order))
    if sorted(_shape(axes, least=0)) != list(range(len(_shape(shape)))):
        _refuse("axes that the array does not have")
    return _array(data, dtype, shape).transpose(axes)


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes into protocol 2: as text of Latin-1."""
    if type(text) is not str or _text(encoding) not in ("latin1", "latin-1"):
        _refuse("a codec other than latin1")
    return text.encode("latin1")


def _array(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    if type(data) is not bytes or not isinstance(dtype, np.dtype) or order not in ("C", "F"):
        _refuse("an array of something other than numbers")
    if math.prod(_shape(shape)) * dtype.itemsize != len(data):
        _refuse(f"an array of shape {shape} and {dtype} with {len(data):,} bytes")
    array = np.frombuffer(data, np.uint8 if dtype.kind == "b" else dtype)
    if dtype.kind == "b":
        if array.max() > 1:
            _refuse("a truth value other than 0 and 1")
        array = array.view(bool)
    return array.reshape(shape, order="F" if order == "F" else "C")


def _shape(shape: Any, least: int = 1) -> tuple[int, ...]:
    if type(shape) is not tuple or not 1 <= len(shape) <= 4:
        _refuse("an array that has no shape of 1 to 4 axes")
    if any(type(n) is not int or not least <= n < 1 << 40 for n in shape):
        _refuse("an array whose shape is no size")
    return shape


def _text(value: Any) -> str:
    """Python 2's names are bytes."""
    if type(value) is bytes:
        return value.decode("ascii")
    return value if type(value) is str else _refuse("something other than a name")


NDARRAY = "numpy.ndarray"  # only an argument, never called
NAMES: dict[tuple[str, str], Any] = {
    (module, name): stand_in
    for modules, name, stand_in in (
        (("numpy.core.multiarray", "numpy._core.multiarray"), "_reconstruct", _reconstruct),
        (("numpy.core.multiarray", "numpy._core.multiarray"), "scalar", _scalar),
        (("numpy.core.numeric", "numpy._core.numeric"), "_frombuffer", _frombuffer),
        (("numpy",), "ndarray", NDARRAY),
        (("numpy",), "dtype", _dtype),
        (("_codecs",), "encode", _encode),
    )
    for module in modules
}


# -- the instructions ----------------------------------------------------------------------------

Step = Callable[[_Machine], None]


def _put(value: Callable[[_Machine], Any]) -> Step:
    def step(m: _Machine) -> None:
        made = value(m)  # first: TUPLE and LIST change which stack is the present one
        m.stack.append(made)

    return step


def _mark(m: _Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _long(m: _Machine) -> int:
    width = m.number(1)
    return m.number(width, signed=True) if width <= 8 else _refuse("a number beyond 64 bits")


def _frame(m: _Machine) -> None:
    length = m.number(8)
    if m.at < m.frame_end or length > m.size - m.at:
        _refuse(f"a frame of {length:,} bytes that does not fit")
    m.frame_end = m.at + length


STEPS: dict[bytes, Step] = {
    pickle.FRAME: _frame,
    pickle.NONE: _put(lambda m: None),
    pickle.NEWTRUE: _put(lambda m: True),
    pickle.NEWFALSE: _put(lambda m: False),
    pickle.BININT: _put(lambda m: m.number(4, signed=True)),
    pickle.BININT1: _put(lambda m: m.number(1)),
    pickle.BININT2: _put(lambda m: m.number(2)),
    pickle.LONG1: _put(_long),
    pickle.SHORT_BINSTRING: _put(lambda m: m.take(m.number(1))),
    pickle.BINSTRING: _put(lambda m: m.take(m.number(4))),
    pickle.SHORT_BINBYTES: _put(lambda m: m.take(m.number(1))),
    pickle.BINBYTES: _put(lambda m: m.take(m.number(4))),
    pickle.BINBYTES8: _put(lambda m: m.take(m.number(8))),
    pickle.BYTEARRAY8: _put(lambda m: m.take(m.number(8))),
    pickle.SHORT_BINUNICODE: _put(lambda m: m.take(m.number(1)).decode()),
    pickle.BINUNICODE: _put(lambda m: m.take(m.number(4)).decode()),
    pickle.BINUNICODE8: _put(lambda m: m.take(m.number(8)).decode()),
    pickle.EMPTY_LIST: _put(lambda m: []),
    pickle.EMPTY_TUPLE: _put(lambda m: ()),
    pickle.MARK: _mark,
    pickle.LIST: _put(lambda m: m.to_mark()),
    pickle.TUPLE: _put(lambda m: tuple(m.to_mark())),
    pickle.TUPLE1: _put(lambda m: tuple(m.top(1))),
    pickle.TUPLE2: _put(lambda m: tuple(m.top(2))),
    pickle.TUPLE3: _put(lambda m: tuple(m.top(3))),
    pickle.APPEND: lambda m: m.extend(m.top(1)),
    pickle.APPENDS: lambda m: m.extend(m.to_mark()),
    pickle.BINPUT: lambda m: m.remember(m.number(1)),
    pickle.LONG_BINPUT: lambda m: m.remember(m.number(4)),
    pickle.MEMOIZE: lambda m: m.remember(len(m.memo)),
    pickle.BINGET: _put(lambda m: m.memo[m.number(1)]),
    pickle.LONG_BINGET: _put(lambda m: m.memo[m.number(4)]),
    pickle.GLOBAL: lambda m: m.find(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.find(*m.top(2)),
    pickle.REDUCE: lambda m: m.reduce(),
    pickle.BUILD: lambda m: m.build(),
}
