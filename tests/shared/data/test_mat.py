import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from shared.data import mat
from shared.data.mat import read_mat

ROOM = 3 * mat.MOST_BYTES  # zlib grows its buffer by doubling

# -- an independent writer -----------------------------------------------------------------------


def header(order="<", text=b"MATLAB 5.0 MAT-file, by hand"):
    return text.ljust(124) + struct.pack(order + "HH", 0x0100, 0x4D49)


def element(kind, payload, order="<"):
    return struct.pack(order + "II", kind, len(payload)) + payload + bytes(-len(payload) % 8)


def matrix(class_, shape, *body, name=b"", flags=0, order="<"):
    head = [
        element(6, struct.pack(order + "II", class_ | flags, 0), order),
        element(5, struct.pack(f"{order}{len(shape)}i", *shape), order),
        element(1, name, order),
    ]
    return element(14, b"".join([*head, *body]), order)


def letters(text, name=b""):
    return matrix(4, (1, len(text)), element(16, text.encode()), name=name)


def doubles(values, shape, name=b"", order="<"):
    body = element(9, struct.pack(f"{order}{len(values)}d", *values), order)
    return matrix(6, shape, body, name=name, order=order)


def names_and_ids(names, ids):
    cells = matrix(1, (len(names), 1), *map(letters, names), name=b"probe_set")
    body = element(4, struct.pack(f"<{len(ids)}H", *ids))
    return cells + matrix(11, (len(ids), 1), body, name=b"probe_ids")


@pytest.fixture
def read(tmp_path):
    def from_bytes(data):
        path = tmp_path / "list.mat"
        path.write_bytes(data)
        return read_mat(path)

    return from_bytes


def refused(read, data, words):
    """ValueError in one line that names the file, within 2 s and ROOM."""
    tracemalloc.start()
    begin = time.monotonic()
    try:
        with pytest.raises(ValueError, match=words) as caught:
            read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "list.mat" in message and "\n" not in message and len(message) < 400
    assert time.monotonic() - begin < 2 and peak < ROOM


# -- what is read --------------------------------------------------------------------------------


def test_reads_a_file_written_byte_by_byte(read):
    data = header() + bytes.fromhex(
        "0e000000 30000000"  # an array of 48 bytes
        "06000000 08000000 0b000000 00000000"  # flags: class 11, uint16
        "05000000 08000000 02000000 01000000"  # 2 x 1
        "01000300 69647300"  # its name in a small element: ids
        "04000400 07000901"  # its values in a small element: 7, 265
    )
    ids = read(data)["ids"]
    assert ids.tolist() == [7, 265] and ids.dtype == np.uint16


@pytest.mark.parametrize("order", ["<", ">"])
def test_reads_either_byte_order_column_by_column(read, order):
    found = read(header(order) + doubles(range(6), (2, 3), b"x", order))["x"]
    assert found.tolist() == [[0, 2, 4], [1, 3, 5]] and found.dtype.isnative


def test_reads_names_and_ids_plain_and_compressed(read):
    body = names_and_ids(["1_2.jpg", "23_1.jpg"], [1, 23])
    for data in (body, b"".join(struct.pack("<II", 15, len(z)) + z for z in compressed(body))):
        found = read(header() + data)
        assert found["probe_set"].tolist() == ["1_2.jpg", "23_1.jpg"]
        assert found["probe_ids"].tolist() == [1, 23]


def compressed(body):
    """Each top-level element as a zlib stream."""
    at, streams = 0, []
    while at < len(body):
        size = 8 + struct.unpack_from("<I", body, at + 4)[0]
        streams.append(zlib.compress(body[at : at + size]))
        at += size
    return streams


def test_reads_16_bit_text_as_utf_16(read):
    text = element(4, "Zürich".encode("utf-16-le"))
    assert read(header() + matrix(4, (1, 6), text, name=b"t"))["t"] == "Zürich"


def test_skips_an_array_without_a_name(read):
    body = matrix(9, (1, 2), element(2, b"\0\1")) + letters("x", b"kept")
    assert read(header() + body) == {"kept": "x"}


def cell(*values, shape=None):
    made = np.empty(len(values), object)
    for i, value in enumerate(values):
        made[i] = value
    return made if shape is None else made.reshape(shape)


def records(*rows):
    return np.array(list(rows), dtype=[("id", object), ("name", object)])


LIKE_SCIPY = {
    "grid": np.arange(6.0).reshape(2, 3),
    "cube": np.arange(24).reshape(2, 3, 4),
    "column": np.array([[1], [2]], np.uint16),
    "scalar": 2.5,
    "wide": np.int64(2**40),
    "complex": np.array([1 + 2j, 3]),
    "truth": np.array([True, False]),
    "nothing": np.zeros((0, 3)),
    "text": "hello",
    "no_text": "",
    "rows": np.array(["ab", "cde"]),
    "cells": cell("x", "yy", shape=(2, 1)),
    "one_cell": cell("x", shape=(1, 1)),
    "no_cells": np.empty((0, 0), object),
    "nested": cell(cell("p", 1), np.arange(3), cell({"a": 1}, "q")),
    "pairs": cell("a", "b", "c", "d", shape=(2, 2)),
    "one_pair": cell("a", "b", shape=(1, 2)),
    "struct": {"a": 1, "b": "q", "c": np.arange(4), "d": {"e": cell("k", shape=(1, 1))}},
    "annotations": records((1, "x.jpg"), (2, "y.jpg")),
}


def same(a, b):
    if type(a) is not type(b):
        return False
    if not isinstance(a, np.ndarray):
        return a == b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.names:
        return all(same(a[name], b[name]) for name in a.dtype.names)
    if a.dtype != object:
        return np.array_equal(a, b)
    return all(same(x, y) for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", LIKE_SCIPY)
def test_values_shapes_and_types_are_scipys(tmp_path, name, compress):
    path = tmp_path / "x.mat"
    scipy.io.savemat(path, {"other": 1, name: LIKE_SCIPY[name]}, do_compression=compress)
    found = read_mat(path)
    assert list(found) == ["other", name]
    assert same(found[name], scipy.io.loadmat(path, squeeze_me=True)[name])


# -- what is refused -----------------------------------------------------------------------------


def test_other_versions_and_files_are_refused_with_a_way_out(read, tmp_path):
    refused(read, b"", "no header of version 5")
    refused(read, b"\x89PNG\r\n\x1a\n" * 40, "no header of version 5")
    refused(read, header(text=b"MATLAB 7.3 MAT-file").ljust(512) + b"\x89HDF", "7.3.*-v7")
    refused(read, bytes(512) + b"\x89HDF\r\n\x1a\n", "7.3.*-v7")
    scipy.io.savemat(tmp_path / "four.mat", {"x": np.arange(3.0)}, format="4")
    refused(read, (tmp_path / "four.mat").read_bytes(), "version 4.*-v7")
    with pytest.raises(ValueError, match=r"gone\.mat: no such file"):
        read_mat(tmp_path / "gone.mat")


def test_classes_that_no_list_needs_are_refused_by_name(read, tmp_path):
    scipy.io.savemat(tmp_path / "s.mat", {"x": scipy.sparse.eye_array(3).tocsc()})
    refused(read, (tmp_path / "s.mat").read_bytes(), "sparse")
    for class_, word in (
        (3, "an object"),
        (16, "a function"),
        (17, "a class instance"),
        (99, "99"),
    ):
        refused(read, header() + matrix(class_, (1, 1), name=b"x"), word)


def deep(levels):
    """Cells in cells: sizes from the inside out."""
    head = matrix(1, (1, 1))[8:]
    inner, heads = letters("x"), []
    size = len(inner)
    for _ in range(levels):
        heads.append(struct.pack("<II", 14, len(head) + size) + head)
        size += 8 + len(head)
    return b"".join(reversed(heads)) + inner


def test_nesting_that_ends_scipy_in_a_segmentation_fault_is_refused(read):
    read(header() + deep(mat.MOST_DEPTH))
    refused(read, header() + deep(mat.MOST_DEPTH + 1), "nested over")
    refused(read, header() + deep(20_000), "nested over")


def test_claims_without_bytes_behind_them_are_refused(read):
    huge = 2_000_000_000
    width = element(5, struct.pack("<i", 1))
    for claim in (
        matrix(1, (huge, 2)),
        matrix(1, (20_000, 20_000)),
        matrix(2, (20_000, 20_000), width, element(1, b"a")),
        matrix(2, (1, 1), width, element(1, b"a" * (1 << 20))),
        matrix(2, (1, 1), element(5, struct.pack("<i", -1)), element(1, b"a")),
        matrix(2, (1, 1), element(5, struct.pack("<i", 0)), element(1, b"")),
        matrix(4, (1, huge), element(16, b"abc")),
        matrix(6, (huge, huge), element(9, b"")),
        matrix(6, (-1, -1), element(9, bytes(8))),
        matrix(6, (), element(9, bytes(8))),
        matrix(6, (1,) * 200, element(9, bytes(8))),
        matrix(6, (1, 1), element(14, bytes(8))),
        matrix(6, (1, 1)),
        struct.pack("<II", 14, huge) + bytes(64),
        struct.pack("<II", 14, 16) + struct.pack("<II", 6, huge) + bytes(8),
        struct.pack("<II", 0x00050001, 0) + bytes(8),
        element(9, bytes(8)),
        b"\x0e\0\0",
    ):
        refused(read, header() + claim, "not a readable MATLAB file")


def test_empty_dimensions_cost_nothing_however_large(read):
    found = read(header() + matrix(4, (2_000_000_000, 0), element(16, b""), name=b"x"))["x"]
    assert found.size == 0


def test_the_number_of_arrays_is_limited(read, monkeypatch):
    monkeypatch.setattr(mat, "MOST_ARRAYS", 1000)
    empty = struct.pack("<II", 14, 0)
    refused(read, header() + matrix(1, (1000, 1), *[empty] * 1000), "more than 1,000 arrays")
    refused(read, header() + empty * 1001, "more than 1,000 arrays")


def test_a_zlib_bomb_is_refused(read):
    body = zlib.compress(element(14, bytes(2 * mat.MOST_BYTES)))
    assert len(body) < 200_000
    refused(read, header() + struct.pack("<II", 15, len(body)) + body, "inflates to more than")


def test_bombs_add_up_over_the_elements(read, monkeypatch):
    monkeypatch.setattr(mat, "MOST_BYTES", 10_000)
    stream = zlib.compress(doubles([0.0] * 400, (400, 1), b"x"))
    three = (struct.pack("<II", 15, len(stream)) + stream) * 3
    assert read(header() + three)["x"].size == 400
    refused(read, header() + three + three[: len(three) // 3], "inflates to more than")


def test_damaged_compressed_data_are_refused(read):
    stream = zlib.compress(doubles([1.0], (1, 1), b"x"))
    for bad in (stream[:-1], stream[:-4] + b"\0\0\0\0", stream[:20], b"", b"\x78\x9c"):
        refused(read, header() + struct.pack("<II", 15, len(bad)) + bad, "not a readable")


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.mat"
    with path.open("wb") as f:
        f.truncate(mat.MOST_BYTES + 1)
    with pytest.raises(ValueError, match="too large"):
        read_mat(path)


def test_every_truncation_is_refused_or_ends_between_variables(read):
    parts = [letters("name", b"a"), doubles([1, 2], (2, 1), b"b")]
    data = header() + b"".join(parts)
    whole = {128: 0, 128 + len(parts[0]): 1, len(data): 2}
    for length in range(len(data)):
        if length in whole:
            assert len(read(data[:length])) == whole[length]
        else:
            with pytest.raises(ValueError, match=r"list\.mat: "):
                read(data[:length])


# -- damage --------------------------------------------------------------------------------------


def sound_bodies(tmp_path):
    path = tmp_path / "sound.mat"
    scipy.io.savemat(path, LIKE_SCIPY)
    return [
        names_and_ids([f"{i}_1.jpg" for i in range(9)], range(9)),
        deep(8),
        path.read_bytes()[128:],
    ]


def damaged(body, rng):
    """A few bytes, words or pieces of a sound body changed, cut out, doubled or cut off."""
    data = bytearray(body)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(data)))
        match rng.integers(6):
            case 0:
                data[at] = rng.integers(256)
            case 1:
                data[at] ^= 1 << rng.integers(8)
            case 2:  # words are where sizes, types, classes and dimensions are
                word = rng.choice([0, 1, 2, 3, 5, 14, 15, 0x40001, 1 << 16, 1 << 31, 0xFFFFFFFF])
                data[at // 4 * 4 : at // 4 * 4 + 4] = struct.pack("<I", word)
            case 3:
                del data[at : at + int(rng.integers(1, 40))]
            case 4:
                data[at:at] = data[at : at + int(rng.integers(1, 40))]
            case 5:
                del data[at:]
        if not data:
            break
    return bytes(data)


def only_value_errors(read, tmp_path, count):
    bodies = sound_bodies(tmp_path)
    rng = np.random.default_rng(0)
    refusals = 0
    for i in range(count):
        body = damaged(bodies[i % len(bodies)], rng)
        if i % 2:  # the damage lies below the compression, where no checksum finds it
            stream = zlib.compress(body, 1)
            body = struct.pack("<II", 15, len(stream)) + stream
        elif i % 10 == 0:
            stream = damaged(zlib.compress(body, 1), rng)
            body = struct.pack("<II", 15, len(stream)) + stream
        begin = time.monotonic()
        try:
            read(header("<>"[i % 50 == 49]) + body)
        except ValueError as error:
            refusals += 1
            assert "list.mat" in str(error) and "\n" not in str(error)
        assert time.monotonic() - begin < 5
    assert count // 2 < refusals < count


def test_damage_gives_value_errors_only(read, tmp_path):
    only_value_errors(read, tmp_path, 300)


@pytest.mark.slow
def test_damage_gives_value_errors_only_at_length(read, tmp_path):
    tracemalloc.start()
    try:
        only_value_errors(read, tmp_path, 6_000)
        assert tracemalloc.get_traced_memory()[1] < ROOM
    finally:
        tracemalloc.stop()
