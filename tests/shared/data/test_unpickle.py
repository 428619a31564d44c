"""The reader of foreign pickles: true ones come out as written, hostile ones run nothing."""

from __future__ import annotations

import contextlib
import copyreg
import os
import pickle
import pickletools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data import unpickle
from shared.data.unpickle import load


def le(number: int, width: int) -> bytes:
    return number.to_bytes(width, "little")


def read(path: Path, data: bytes):
    path.write_bytes(data)
    return load(path)


def refused(path: Path, data: bytes, match: str | None = None) -> str:
    """One line that names the file; the finding."""
    with pytest.raises(ValueError, match=match) as caught:
        read(path, data)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# -- pickles, written byte by byte ---------------------------------------------------------------


def python2_array(pixels: np.ndarray, dtype: bytes = b"u1") -> bytes:
    """As Python 2's cPickle with numpy 1.x writes an array in protocol 2: names and data as str,
    the shape as longs where it was computed."""
    shape = b"".join(b"\x8a\x01" + le(n, 1) for n in pixels.shape)
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01(" + shape + b"t"
        b"cnumpy\ndtype\nU" + le(len(dtype), 1) + dtype + b"K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + le(pixels.nbytes, 4) + pixels.tobytes() + b"tb"
    )  # fmt: skip


def python2_bin(images: list[bytes], same: list[bool]) -> bytes:
    """cPickle.dump((bins, issame), f, protocol=2): str as SHORT_BINSTRING or BINSTRING, each put
    into the memo, lists in batches of 1000."""
    out, put = b"\x80\x02]q\x01", 2
    for start in range(0, len(images), 1000):
        out += b"("
        for data in images[start : start + 1000]:
            long = len(data) > 255
            out += (b"T" + le(len(data), 4) if long else b"U" + le(len(data), 1)) + data
            out += b"q" + le(put, 1) if put < 256 else b"r" + le(put, 4)
            put += 1
        out += b"e"
    out += b"]r" + le(put, 4) + b"(" + b"".join(b"\x88" if s else b"\x89" for s in same) + b"e"
    return out + b"\x86r" + le(put + 1, 4) + b"."


def framed_bin(images: list[bytes], same: list[bool]) -> bytes:
    """Protocol 4: everything in one frame but the payloads of 64 KiB and more, as pickle does."""
    parts = [b""]
    parts[-1] += b"]\x94("
    for data in images:
        if len(data) >= 1 << 16:
            parts += [b"B" + le(len(data), 4) + data, b""]  # no frame around it
        elif len(data) > 255:
            parts[-1] += b"B" + le(len(data), 4) + data
        else:
            parts[-1] += b"C" + le(len(data), 1) + data
        parts[-1] += b"\x94"
    parts[-1] += b"e]\x94(" + b"".join(b"\x88" if s else b"\x89" for s in same) + b"e\x86\x94."
    out = b"\x80\x04"
    for number, part in enumerate(parts):
        out += part if number % 2 else b"\x95" + le(len(part), 8) + part
    return out


IMAGES = [bytes(260), b"\xff\xd8\xff" + bytes(9), b"PNG", b"\x80\x02]."]
SAME = [True, False]


def test_python2_protocol_2_bytes_come_out_as_written(tmp_path):
    images = [bytes([k % 256]) * (k % 300 + 1) for k in range(2_500)]  # several batches, long memo
    found = read(tmp_path / "a", python2_bin(images, [True, False] * 625))
    assert found == (images, [True, False] * 625)


def test_framed_protocol_4_comes_out_as_written(tmp_path):
    images = [*IMAGES, bytes(range(256)) * 300]
    assert read(tmp_path / "a", framed_bin(images, SAME)) == (images, SAME)
    assert pickle.loads(framed_bin(images, SAME)) == (images, SAME)  # the writer is right


def test_python2_arrays_come_out_as_written(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    found = read(tmp_path / "a", b"\x80\x02]" + python2_array(pixels) + b"a.")
    assert found[0].dtype == np.uint8 and np.array_equal(found[0], pixels)
    truth = np.array([True, False, True])
    found = read(tmp_path / "a", b"\x80\x02" + python2_array(truth, b"b1") + b".")
    assert found.dtype == bool and found.tolist() == truth.tolist()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_standard_library_writes_what_is_read(tmp_path, protocol):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    big = rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    arrays = [pixels, pixels.transpose(2, 0, 1), np.asfortranarray(pixels), big, pixels[:, 0, 0]]
    arrays += [np.arange(6, dtype=kind) for kind in ("<i2", ">i4", "u8", "<f4", "f8")]
    arrays += [pixels, np.array([[True, False]])]  # the first stands twice, from the memo
    plain = [True, None, "é", b"\x00\xff", 0, 255, 70_000, -1, 2**40, [], (), (1,), (1, 2, 3, 4)]
    scalars = [np.bool_(True), np.int64(-7), np.float32(0.5)]
    found = read(tmp_path / "a", pickle.dumps((arrays, plain, scalars), protocol))
    for have, want in zip(found[0], arrays, strict=True):
        assert have.dtype == want.dtype and np.array_equal(have, want)
    assert found[1] == plain
    assert found[2] == [True, -7, 0.5] and type(found[2][0]) is bool


def test_python3_bytes_in_protocol_2_are_latin1_text(tmp_path):
    data = bytes(range(256)) * 5
    written = pickle.dumps([data, data, data[::-1]], 2)
    assert b"_codecs" in written
    assert read(tmp_path / "a", written) == [data, data, data[::-1]]


# -- hostile files -------------------------------------------------------------------------------


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def text(word: str | bytes) -> bytes:
    data = word if isinstance(word, bytes) else word.encode()
    return b"X" + le(len(data), 4) + data


def hostile(folder: Path, command: str) -> dict[str, tuple[bool, bytes]]:
    """Name: (pickle.loads runs the command, the file)."""
    call = text(command) + b"\x85R."
    array = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    dtype = (
        b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff"
    )
    dtype += b"\xffJ\xff\xff\xff\xffK\x3ftb"
    saved = folder / "evil.npy"
    np.save(saved, np.array([Evil(command)], dtype=object), allow_pickle=True)
    sure = {
        "global": b"\x80\x02cposix\nsystem\n" + call,
        "global of os": b"\x80\x02cos\nsystem\n" + call,
        "protocol 0": b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "inst": b"\x80\x02(" + text(command) + b"iposix\nsystem\n.",
        "obj": b"\x80\x02(cposix\nsystem\n" + text(command) + b"o.",
        "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + call,
        "stack global of memo": b"\x80\x04\x8c\x05posix\x940\x8c\x06system\x940h\x00h\x01\x93"
        + call,
        "dotted name": b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93" + call,
        "getattr": b"\x80\x02cbuiltins\ngetattr\ncos\npath\n" + text("os") + b"\x86R0"
        b"cbuiltins\neval\n" + text(f"__import__('os').system({command!r})") + b"\x85R.",
        "extension": b"\x80\x02\x82\x77" + call,
        "reduce in an image": pickle.dumps(([Evil(command), b"x"], [True]), 4),
        "object array": pickle.dumps(([np.array([Evil(command)], dtype=object)] * 2, [True]), 4),
        "object array, protocol 5": pickle.dumps(np.array([Evil(command)], dtype=object), 5),
        "object array by hand": b"\x80\x03" + array + b"(K\x01K\x01\x85" + dtype + b"\x89]cposix\n"
        b"system\n" + text(command) + b"\x85Ratb.",
        "numpy.load": b"\x80\x02cnumpy\nload\n" + text(str(saved)) + b"N\x88\x87R.",
        "map over system": b"\x80\x02cbuiltins\nlist\ncbuiltins\nmap\ncposix\nsystem\n]"
        + text(command) + b"a\x86R\x85R.",
    }  # fmt: skip
    unsure = {
        "newobj": b"\x80\x02csubprocess\nPopen\n" + text(command) + b"\x85\x81.",
        "newobj_ex": b"\x80\x04csubprocess\nPopen\n" + text(command) + b"\x85}\x92.",
        "persid": b"\x80\x02P" + command.encode() + b"\n.",
        "binpersid": b"\x80\x02" + text(command) + b"Q.",
        "build of a function": b"\x80\x02cposix\nsystem\n}b.",
        "build with a state": b"\x80\x02cfunctools\npartial\ncos\nsystem\n\x85R(cos\nsystem\n"
        + text(command) + b"\x85}Ntb.",
        "build of a list": b"\x80\x02]}b.",
        "call of ndarray": b"\x80\x02cnumpy\nndarray\nJ\x00\x00\x00\x40\x85\x85R.",
        "call of text": b"\x80\x02" + text("os.system") + call,
        "call of an array": b"\x80\x02" + python2_array(np.zeros(1, np.uint8)) + call,
        "another class": b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncposix\nsystem\nK\x00\x85"
        b"C\x01b\x87R.",
        "rot13": b"\x80\x02c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R.",
        "utf-7": b"\x80\x02c_codecs\nencode\n" + text("x") + text("utf-7") + b"\x86R.",
        "zip bomb": b"\x80\x02c_codecs\ndecode\nC\x04abcd" + text("zip") + b"\x86R.",
        "dictionary": b"\x80\x02}X\x01\x00\x00\x00aK\x01s.",
        "record dtype": b"\x80\x02cnumpy\ndtype\n" + text("V8") + b"\x89\x88\x87R.",
        "out of band buffer": b"\x80\x05\x97.",
    }  # fmt: skip
    return {k: (True, v) for k, v in sure.items()} | {k: (False, v) for k, v in unsure.items()}


def test_hostile_pickles_run_nothing_and_are_refused(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    files = hostile(tmp_path, f"touch {canary}")
    assert len(files) >= 30
    monkeypatch.setitem(copyreg._inverted_registry, 0x77, ("posix", "system"))
    for name, (runs, data) in files.items():
        path = tmp_path / f"{name.replace(' ', '_')}.bin"
        message = refused(path, data, match="nothing was run")
        assert "byte " in message, name
        assert not canary.exists(), name
        if runs:  # the file is live: Python's own reader runs it
            with contextlib.suppress(Exception):
                pickle.loads(data)
            assert canary.exists(), name
            canary.unlink()


def test_refusals_say_what_the_file_asks_for(tmp_path):
    path = tmp_path / "x.bin"
    refused(path, b"\x80\x02cposix\nsystem\nN\x85R.", match="byte 2: asks for 'posix.system'")
    refused(path, b"\x80\x02]}b.", match="byte 3: instruction EMPTY_DICT is not allowed")
    refused(path, b"\x80\x02\xf1.", match=r"byte 2: instruction b'.xf1' is not allowed")
    refused(path, b"", match="byte 0: not a pickle of protocol 2 to 5")
    refused(path, b"(lp0\n.", match="byte 0: not a pickle of protocol 2 to 5")
    refused(path, b"\x80\x06N.", match="not a pickle of protocol 2 to 5")
    refused(path, b"\x80\x02N.N", match="byte 3: ends here, but 1 bytes follow")
    with pytest.raises(ValueError, match="absent.bin: no such file"):
        load(tmp_path / "absent.bin")


def array4(shape: bytes, data: bytes, dtype: bytes = b"u1", fortran: bytes = b"\x89") -> bytes:
    return (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
        b"(K\x01" + shape + b"cnumpy\ndtype\nX" + le(len(dtype), 4) + dtype + b"\x89\x88\x87R(K\x03"
        b"X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + fortran + data + b"tb."
    )  # fmt: skip


HUGE = b"\x8a\x08" + le(2**62, 8)
FINE = array4(b"K\x02\x85", b"C\x02ab")
BOMBS = {
    "claims more than the file has": b"\x80\x04\x8e" + le(2**62, 8) + b"abc.",
    "claims 4 GiB of text": b"\x80\x02X" + b"\xff" * 4 + b"abc.",
    "claims 4 GiB of str": b"\x80\x02T" + b"\xff" * 4 + b"abc.",
    "claims a huge bytearray": b"\x80\x05\x96" + b"\xff" * 8 + b"abc.",
    "claims a huge integer": b"\x80\x02\x8b" + le(2**31 - 1, 4) + b"abc.",
    "integer of 255 bytes": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "frame beyond the file": b"\x80\x04\x95" + le(2**63, 8) + b"N.",
    "frame beyond by one": b"\x80\x04\x95" + le(3, 8) + b"N.",
    "frame too short": b"\x80\x04\x95" + le(3, 8) + b"C\x03abc.",
    "frame within a frame": b"\x80\x04\x95" + le(11, 8) + b"\x95" + le(2, 8) + b"N.",
    "array of 2^62 rows": array4(HUGE + b"\x85", b"C\x01a"),
    "array of 2^93": array4((b"\x8a\x04" + le(2**31 - 1, 4)) * 3 + b"\x87", b"C\x01a"),
    "array of negative size": array4(b"J" + b"\xff" * 4 + b"J" + b"\xff" * 4 + b"\x86", b"C\x01a"),
    "array of no rows": array4(b"K\x00\x85", b"C\x00"),
    "array without axes": array4(b")", b"C\x01a"),
    "array of 5 axes": array4(b"(K\x01K\x01K\x01K\x01K\x01t", b"C\x01a"),
    "array of true rows": array4(b"\x88\x85", b"C\x01a"),
    "array of a list": array4(b"K\x01\x85", b"]"),
    "array of text": array4(b"K\x01\x85", b"X\x01\x00\x00\x00a"),
    "array of half a number": array4(b"K\x01\x85", b"C\x01a", dtype=b"i2"),
    "array of truth 2": array4(b"K\x01\x85", b"C\x01\x02", dtype=b"b1"),
    "array of text dtype": array4(b"K\x01\x85", b"C\x01a", dtype=b"S1"),
    "array of objects": array4(b"K\x01\x85", b"C\x08abcdefgh", dtype=b"O8"),
    "array of neither order": array4(b"K\x01\x85", b"C\x01a", fortran=b"K\x01"),
    "array never finished": FINE[: FINE.index(b"(")] + b".",
    "array finished twice": FINE[:-1] + b"Nb.",
    "array finished twice, alike": FINE[:-1] + FINE[FINE.index(b"(") :],
    "a function as data": b"\x80\x02cnumpy\ndtype\n.",
    "a function in a list": b"\x80\x02]cnumpy\ndtype\na.",
    "memo key that is not there": b"\x80\x02h\x07.",
    "empty stack": b"\x80\x02\x86.",
    "mark never set": b"\x80\x02Nt.",
    "two objects": b"\x80\x02NN.",
    "an open mark": b"\x80\x02N(N.",
    "append to a tuple": b"\x80\x02)Na.",
    "name without end": b"\x80\x02c" + b"a" * 500,
    "text that is no UTF-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_claims_are_refused_before_anything_is_allocated(tmp_path, name):
    tracemalloc.start()
    try:
        refused(tmp_path / "x.bin", BOMBS[name])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_sound_array_by_the_same_writer_is_read(tmp_path):
    assert read(tmp_path / "x", FINE).tolist() == [97, 98]
    found = read(tmp_path / "x", array4(b"K\x02K\x02\x86", b"C\x04abcd", fortran=b"\x88"))
    assert found.tolist() == [[97, 99], [98, 100]]


def test_a_huge_memo_key_takes_no_memory(tmp_path):
    tracemalloc.start()
    try:
        data = b"\x80\x02Nr\xff\xff\xff\xff0"[:-1] + b"j\xff\xff\xff\xff\x86."
        assert read(tmp_path / "x", data) == (None, None)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_repetition_through_the_memo_makes_no_copies(tmp_path):
    """Ten levels of ten are 10^10 leaves by reference; the same 100 KB as bytes 4,000 times is
    refused, for those are copies."""
    levels = b"]\x94" + b"".join(b"](" + b"h" + le(k, 1) + (b"h" + le(k, 1)) * 9 + b"e\x94"
                                 for k in range(10))  # fmt: skip
    tracemalloc.start()
    try:
        found = read(tmp_path / "x", b"\x80\x04(" + levels + b"t.")
        assert len(found) == 11 and len(found[-1]) == 10
        call = b"c_codecs\nencode\n" + text("a" * 100_000) + text("latin1") + b"\x86"
        again = b"h\x00h\x01R" * 4_000
        data = b"\x80\x02(c_codecs\nencode\nq\x00" + call[call.index(b"X") :] + b"q\x01R" + again
        refused(tmp_path / "x", data + b"t.", match="makes more bytes than the file has")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("nest", [b"\x85", b"](", b"("])
def test_deep_nesting_neither_crashes_nor_recurses(tmp_path, nest):
    """Also not where a deep tuple stands for a name: hashing it would overflow the C stack."""
    depth = 150_000
    if nest == b"\x85":
        deep = b")" + nest * depth
        assert type(read(tmp_path / "x", b"\x80\x04" + deep + b".")) is tuple
        for use in (b"N\x93.", b"N\x86R.", b"b."):
            refused(tmp_path / "x", b"\x80\x04" + deep + use)
        refused(tmp_path / "x", array4(deep + b"\x85", b"C\x01a"))
        refused(tmp_path / "x", b"\x80\x04cnumpy\ndtype\n" + deep + b"NN\x87R.")
        order = FINE.replace(b"X\x01\x00\x00\x00|", deep)
        refused(tmp_path / "x", order)
    elif nest == b"](":
        end = b"e" * depth
        assert type(read(tmp_path / "x", b"\x80\x04" + nest * depth + end + b".")) is list
    else:
        assert type(read(tmp_path / "x", b"\x80\x04" + nest * depth + b"t" * depth + b".")) is tuple


def test_instructions_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickle, "MOST_OPCODES", 1_000)
    assert len(read(tmp_path / "x", b"\x80\x02](" + b"N" * 996 + b"e.")) == 996
    refused(tmp_path / "x", b"\x80\x02](" + b"N" * 997 + b"e.", match="more than 1,000 instr")


# -- damage --------------------------------------------------------------------------------------


def numpy_bin(protocol: int) -> bytes:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    return pickle.dumps(([pixels, pixels[::-1].copy()], np.array([True])), protocol)


SMALL = {
    "python 2": python2_bin(IMAGES, SAME),
    "framed": framed_bin(IMAGES, SAME),
    "python 2 arrays": b"\x80\x02](" + python2_array(np.eye(3, dtype=np.uint8)) + b"e](\x88e\x86.",
    "numpy, protocol 2": numpy_bin(2),
    "numpy, protocol 4": numpy_bin(4),
    "numpy, protocol 5": numpy_bin(5),
}  # fmt: skip


def sound(value, depth: int = 0) -> bool:
    """Plain data only, whatever the damage."""
    if type(value) in (list, tuple):
        return depth < 50 and all(sound(v, depth + 1) for v in value)
    if isinstance(value, np.ndarray):
        return type(value) is np.ndarray and value.dtype.kind in "biuf" and value.nbytes < 10_000
    return type(value) in (bytes, str, int, float, bool, type(None)) or isinstance(value, np.dtype)


def read_damaged(path: Path, data: bytes) -> None:
    """A clear refusal or plain data."""
    path.write_bytes(data)
    try:
        found = load(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: byte ") and "\n" not in str(error)
    else:
        assert sound(found)


@pytest.mark.parametrize("name", SMALL)
def test_truncation_at_every_offset_is_an_error(tmp_path, name):
    data = SMALL[name]
    assert sound(read(tmp_path / "x", data))
    for end in range(len(data)):
        refused(tmp_path / "x", data[:end])


@pytest.mark.parametrize("name", SMALL)
def test_every_flipped_bit_is_an_error_or_gives_plain_data(tmp_path, name):
    data = SMALL[name]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        read_damaged(tmp_path / "x", bytes(flipped))


ANY = settings(deadline=None, derandomize=True, max_examples=4_000)


@pytest.mark.slow
@ANY
@given(st.data())
def test_damaged_files(tmp_path_factory, data):
    file = bytearray(data.draw(st.sampled_from(list(SMALL.values()))))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, max(len(file) - 1, 0)))
        size = data.draw(st.integers(0, 12))
        file[at : at + size] = data.draw(st.binary(max_size=12))
    read_damaged(tmp_path_factory.getbasetemp() / "damaged.bin", bytes(file))


def argument(op, data) -> bytes:
    """Some bytes for an opcode's argument, rightly formed more often than not."""
    if op.arg is None:
        return b""
    kind = op.arg.name
    some = data.draw(st.sampled_from([b"", b"ab", b"u1", b"|", b"latin1", b"numpy", b"dtype"]))
    if kind == "stringnl_noescape_pair":
        names = ["numpy\ndtype", "numpy\nndarray", "posix\nsystem", "_codecs\nencode"]
        names += ["numpy.core.multiarray\nscalar", "numpy.core.multiarray\n_reconstruct"]
        names += ["numpy.core.numeric\n_frombuffer"]
        return data.draw(st.sampled_from(names)).encode() + b"\n"
    if op.arg.n >= 0:
        width = op.arg.n
        return le(data.draw(st.integers(0, 8)), width) if width else b""
    for width, mark in ((1, "1"), (8, "8"), (4, "4")):
        if kind.endswith(mark):
            return le(len(some), width) + some
    return some + b"\n"


@pytest.mark.slow
@ANY
@given(st.data())
def test_random_programs(tmp_path_factory, data):
    """Well-formed instructions in any order: what bit flips seldom reach."""
    allowed = [op for op in pickletools.opcodes if op.code.encode("latin1") in unpickle.STEPS]
    assert len(allowed) == len(unpickle.STEPS)
    names = [op for op in allowed if op.name in ("GLOBAL", "BININT1", "REDUCE", "TUPLE2", "BUILD")]
    program = b""
    for op in data.draw(st.lists(st.sampled_from(allowed + 3 * names), max_size=30)):
        program += op.code.encode("latin1") + argument(op, data)
    end = data.draw(st.sampled_from([b".", b"t.", b""]))
    read_damaged(tmp_path_factory.getbasetemp() / "program.bin", b"\x80\x04" + program + end)
