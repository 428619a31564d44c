"""MATLAB files of annotations, read without trust: version 5, which MATLAB writes for -v6 and -v7.

Own code although scipy reads the format, for scipy.io.loadmat (seen with 1.17) believes what a file
says of itself: it ends the process with a segmentation fault on 20,000 nested cells (a file of
1 MB), takes 3 GiB for a cell array whose 200 bytes claim 20,000 x 20,000, and is not back after a
minute from a struct of a million fields of one name. Here sizes, dimensions and depth are held
against the bytes that are there before anything is made of them.

Layout: The MathWorks, "MAT-File Format", chapter on level 5.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MOST_BYTES = 1 << 25  # of one file, and of all that is compressed in it: lists are a few MB
MOST_ARRAYS = 1 << 20  # every cell and every field is an array; lists have 100,000
MOST_DEPTH = 16

NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8",
           12: "i8", 13: "u8"}  # fmt: skip
TEXTS = {1: "ascii", 2: "ascii", 4: "utf-16-", 16: "utf-8", 17: "utf-16-", 18: "utf-32-"}
MATRIX, COMPRESSED = 14, 15
CELL, STRUCT, CHAR = 1, 2, 4
UNREAD = {3: "an object", 5: "a sparse matrix", 16: "a function", 17: "a class instance"}


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB file, in the form of scipy.io.loadmat(..., squeeze_me=True).

    Numbers keep the type they are stored in; char arrays become str (or arrays of str, a row each);
    cells are object arrays; structs are arrays with an object field for each of theirs; dimensions
    of 1 are dropped, and what has one element only is that element (save a struct). Text of 16-bit
    units is read as UTF-16, where scipy keeps the low byte.

    Raises ValueError naming the file where it is missing, damaged, too large, of version 4 or 7.3,
    or holds what is neither number, text, cell nor struct.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes is too large for annotations")
    try:
        return _Level5(path.read_bytes()).variables()
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable MATLAB file ({error})") from None


class _Level5:
    """One file: its bytes, their order, and how much has been made of them so far."""

    def __init__(self, data: bytes) -> None:
        if data[:10] == b"MATLAB 7.3" or b"\x89HDF" in (data[:4], data[512:516]):
            raise ValueError("version 7.3, which is HDF5; save it again with -v7")
        if b"\0" in data[:4]:
            raise ValueError("version 4, or no MATLAB file; save it again with -v7")
        if data[126:128] not in (b"IM", b"MI"):
            raise ValueError("no header of version 5")
        self.order = "<" if data[126:128] == b"IM" else ">"
        self.data = memoryview(data)
        self.inflated = self.arrays = 0
        if data[125 if self.order == "<" else 124] != 1:
            raise ValueError("no header of version 5")

    def variables(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind, payload in self.elements(self.data[128:]):
            if kind == COMPRESSED:
                kind, payload = _next(self.elements(self.inflate(payload)))
            if kind != MATRIX:
                raise ValueError(f"element of type {kind} where a variable belongs")
            name, value = self.matrix(payload, depth=0)
            if name:  # MATLAB's own notes to itself have none
                found[name] = value
        return found

    def inflate(self, payload: memoryview) -> memoryview:
        stream = zlib.decompressobj()
        data = stream.decompress(payload, MOST_BYTES - self.inflated + 1)
        self.inflated += len(data)
        if self.inflated > MOST_BYTES:
            raise ValueError(f"inflates to more than {MOST_BYTES:,} bytes")
        if not stream.eof:
            raise ValueError("compressed data end early")
        return memoryview(data)

    def elements(self, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """(type, payload) of one element after another, each checked to lie within `data`."""
        at = 0
        while at < len(data):
            first, size = self.numbers("I", data[at : at + 8], 2)
            if first >> 16:  # up to 4 bytes: size, type and payload share one tag
                kind, size, start, stop = first & 0xFFFF, first >> 16, at + 4, at + 8
                if size > 4:
                    raise ValueError(f"small element of {size} bytes")
            else:
                kind, start = first, at + 8
                stop = start + size + (0 if kind == COMPRESSED else -size % 8)
                if start + size > len(data):
                    raise ValueError(f"element of {size:,} bytes where {len(data) - start:,} are")
            yield kind, data[start : start + size]
            at = stop

    def numbers(self, kind: str, payload: memoryview, count: int = 0) -> tuple[int, ...]:
        """32-bit integers, "i" or "I": `count` of them, or up to 32."""
        if len(payload) % 4 or len(payload) > 128 or (count and len(payload) != 4 * count):
            raise ValueError(f"{len(payload)} bytes in a tag or header")
        return struct.unpack(f"{self.order}{len(payload) // 4}{kind}", payload)

    def matrix(self, data: memoryview, depth: int) -> tuple[str, Any]:
        """(name, value) of an array from its payload."""
        self.arrays += 1
        if self.arrays > MOST_ARRAYS or depth > MOST_DEPTH:
            raise ValueError(f"more than {MOST_ARRAYS:,} arrays, or nested over {MOST_DEPTH} deep")
        if not data:
            return "", np.array([])
        parts = self.elements(data)
        flags = self.numbers("I", _next(parts)[1], 2)[0]
        kind = flags & 0xFF
        if kind in UNREAD or not 1 <= kind <= 15:
            raise ValueError(f"holds {UNREAD.get(kind, f'an array of class {kind}')}")
        shape = self.numbers("i", _next(parts)[1])
        if not shape or min(shape) < 0:
            raise ValueError(f"dimensions {shape}")
        name = bytes(_next(parts)[1]).decode("latin-1")
        count = math.prod(shape)
        if kind in (CELL, STRUCT):
            fields = self.fields(parts) if kind == STRUCT else []
            each = len(fields) or 1
            if count * each > len(data) // 8:  # each has a tag of 8 bytes at the least
                raise ValueError(f"{count * each:,} cells or fields in {len(data):,} bytes")
            values = np.empty(count, [(f, object) for f in fields] if fields else object)
            for i in range(count):
                items = tuple(self.inner(parts, depth) for _ in range(each))
                values[i] = items if fields else items[0]
        elif kind == CHAR:
            return name, self.text(parts, shape)
        else:
            values = self.array(parts, count)
            if flags & 0x800:
                values = values + 1j * self.array(parts, count)
        return name, _squeezed(values, shape)

    def inner(self, parts: Iterator[tuple[int, memoryview]], depth: int) -> Any:
        kind, payload = _next(parts)
        if kind != MATRIX:
            raise ValueError(f"element of type {kind} where a cell or field belongs")
        return self.matrix(payload, depth + 1)[1]

    def fields(self, parts: Iterator[tuple[int, memoryview]]) -> list[str]:
        (width,) = self.numbers("i", _next(parts)[1], 1)
        names = bytes(_next(parts)[1])
        if width < 1 or len(names) % width or not 1 <= len(names) // width <= 1000:
            raise ValueError(f"struct with {len(names):,} bytes of field names of {width}")
        cut = [names[i : i + width].split(b"\0")[0] for i in range(0, len(names), width)]
        if len(set(cut)) != len(cut) or b"" in cut:
            raise ValueError("struct with fields of one name, or of none")
        return [name.decode("latin-1") for name in cut]

    def array(self, parts: Iterator[tuple[int, memoryview]], count: int) -> np.ndarray:
        kind, payload = _next(parts)
        if kind not in NUMBERS:
            raise ValueError(f"element of type {kind} where numbers belong")
        dtype = np.dtype(self.order + NUMBERS[kind])
        if len(payload) != count * dtype.itemsize:
            raise ValueError(f"{len(payload):,} bytes for {count:,} numbers")
        return np.frombuffer(payload, dtype).astype(dtype.newbyteorder("="))

    def text(self, parts: Iterator[tuple[int, memoryview]], shape: tuple[int, ...]) -> Any:
        kind, payload = _next(parts)
        if kind not in TEXTS:
            raise ValueError(f"element of type {kind} where text belongs")
        codec = TEXTS[kind]
        if codec[-1] == "-":
            codec += "le" if self.order == "<" else "be"
        text = bytes(payload).decode(codec)
        if len(text) != math.prod(shape):
            raise ValueError(f"{len(text):,} letters for dimensions {shape}")
        if text and len(text) == shape[-1]:
            return text.rstrip("\0")
        letters = np.frombuffer(text.encode("utf-32-le"), "<U1")
        if not text:
            return letters
        rows = np.ascontiguousarray(letters.reshape(shape, order="F"))
        return _squeezed(rows.view(f"<U{shape[-1]}").ravel(order="F"), shape[:-1])


def _next(parts: Iterator[tuple[int, memoryview]]) -> tuple[int, memoryview]:
    part = next(parts, None)
    if part is None:
        raise ValueError("an array ends early")
    return part


def _squeezed(values: np.ndarray, shape: tuple[int, ...]) -> Any:
    """Column-major `values` in `shape` less the dimensions of 1; none left: the element itself."""
    if not values.size:
        return values
    array = values.reshape(shape, order="F").squeeze()
    return array if array.shape or array.dtype.names else array.item()
