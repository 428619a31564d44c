"""Rows on disk: what is there is right, what is not right is computed anew, whoever was killed."""

from __future__ import annotations

import struct
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared.data.kept import Rows, fill
from shared.data.pipeline import Resident
from tests.conftest import python
from tests.forked import forked

COUNT, VIEWS, SIZE, WIDTH = 23, 3, 5, 7  # images, views, images a part, numbers a row
EVERY_VIEW = range(VIEWS)
PARTS = [(view, part) for view in range(VIEWS) for part in range(5)]

IMAGES = Resident(
    torch.arange(COUNT, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2), [0] * COUNT
)


def expected(view: int, image: int) -> list[float]:
    return [image + 100 * view + k / 8 for k in range(WIDTH)]  # exact in bfloat16 up to 255


class Work:
    """A run of one rank, and the computation: every call is counted."""

    rank, world, device = 0, 1, torch.device("cpu")

    def __init__(self) -> None:
        self.said: list[str] = []
        self.made: list[tuple[int, int]] = []  # (view, first image)

    def say(self, line: str) -> None:
        self.said.append(line)

    def broadcast(self, value):
        return value

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        return local

    def make(self, pixels: torch.Tensor, view: int) -> list[torch.Tensor]:
        assert len(pixels) == SIZE
        numbers = pixels[:, 0, 0, 0].tolist()
        self.made.append((view, numbers[0]))
        return [torch.tensor([expected(view, n) for n in numbers])]


def rows(folder: Path, dtype: torch.dtype = torch.float32) -> Rows:
    return Rows(folder / "rows", VIEWS, COUNT, WIDTH, dtype, SIZE)


def filled(folder: Path, views: Iterable[int] = EVERY_VIEW) -> Work:
    work = Work()
    fill(work, IMAGES, [rows(folder)], views, work.make, "rows")
    return work


def assert_right(folder: Path) -> None:
    found = np.fromfile(folder / "rows", "<f4").reshape(VIEWS, COUNT, WIDTH)
    oracle = [[expected(v, n) for n in range(COUNT)] for v in range(VIEWS)]
    assert np.array_equal(found, np.array(oracle, np.float32))


def test_the_file_is_views_x_images_x_width_and_a_checksum_for_each_part(tmp_path: Path) -> None:
    work = filled(tmp_path)
    assert_right(tmp_path)
    content, sums = (tmp_path / "rows").read_bytes(), (tmp_path / "rows.sums").read_bytes()
    for (view, part), noted in zip(PARTS, struct.iter_unpack("<Q", sums), strict=True):
        first, last = view * COUNT + part * SIZE, view * COUNT + min(part * SIZE + SIZE, COUNT)
        crc = zlib.crc32(content[first * WIDTH * 4 : last * WIDTH * 4])
        assert noted == (2**32 + crc,)
    assert len(work.made) == len(PARTS) and "images/s, kept in" in work.said[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_read_gives_the_rows_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    work, kept = Work(), rows(tmp_path, dtype)
    whole = torch.randint(0, 200, (VIEWS, COUNT, WIDTH)).to(dtype)

    def make(pixels: torch.Tensor, view: int) -> list[torch.Tensor]:
        return [whole[view, pixels[:, 0, 0, 0].long()]]

    fill(work, IMAGES, [kept], range(VIEWS), make, "rows")
    view, index = torch.randint(VIEWS, (40,)), torch.randint(COUNT, (40,))
    found = kept.read(view, index)
    assert found.dtype == dtype and torch.equal(found, whole[view, index])
    plain = kept.float32(1) if dtype != torch.uint8 else whole[1].float().numpy()
    assert plain.dtype == np.float32 and np.array_equal(plain, whole[1].float().numpy())


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    assert [view for view, _ in filled(tmp_path, [1]).made] == [1] * 5
    assert not rows(tmp_path).whole()
    assert Counter(view for view, _ in filled(tmp_path).made) == {0: 5, 2: 5}
    assert rows(tmp_path).whole()
    again = filled(tmp_path)
    assert again.made == [] and again.said == []
    assert_right(tmp_path)


def test_rows_of_one_view_are_read_only(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        rows(tmp_path).float32(0)[0, 0] = 1


@pytest.mark.parametrize("part", [0, 7, 14])
def test_a_damaged_part_is_computed_anew_and_said(tmp_path: Path, part: int) -> None:
    filled(tmp_path)
    view, number = PARTS[part]
    content = bytearray((tmp_path / "rows").read_bytes())
    content[(view * COUNT + number * SIZE) * WIDTH * 4 + 11] ^= 4
    (tmp_path / "rows").write_bytes(content)
    work = filled(tmp_path)
    assert work.made == [(view, number * SIZE)]
    assert work.said[0] == f"{tmp_path}: 1 damaged parts of rows are computed anew"
    assert_right(tmp_path)


def cut_rows(folder: Path) -> int:
    content = (folder / "rows").read_bytes()
    (folder / "rows").write_bytes(content[: COUNT * WIDTH * 4 + 1])  # of view 1 a single byte
    return 10


def cut_sums(folder: Path) -> int:
    (folder / "rows.sums").write_bytes((folder / "rows.sums").read_bytes()[: 8 * 4 + 3])
    return 11


def no_rows(folder: Path) -> int:
    (folder / "rows").unlink()
    return 15


def no_sums(folder: Path) -> int:
    (folder / "rows.sums").unlink()
    return 15


def other_sums(folder: Path) -> int:
    (folder / "rows.sums").write_bytes(b"\xff" * 500)
    return 15


def longer(folder: Path) -> int:
    for name in ("rows", "rows.sums"):
        with open(folder / name, "ab") as file:
            file.write(b"more")
    return 0


@pytest.mark.parametrize("damage", [cut_rows, cut_sums, no_rows, no_sums, other_sums, longer])
def test_whatever_happened_to_the_files_the_rows_are_right(tmp_path: Path, damage) -> None:
    filled(tmp_path)
    lost = damage(tmp_path)
    assert len(filled(tmp_path).made) == lost
    assert_right(tmp_path)


def test_a_part_that_was_written_but_not_noted_is_not_believed(tmp_path: Path) -> None:
    filled(tmp_path)
    with open(tmp_path / "rows.sums", "r+b") as file:
        file.seek(8 * 6)
        file.write(bytes(8))
    assert filled(tmp_path).made == [(1, SIZE)]


@pytest.mark.parametrize("after", [1, 4, 11])
def test_a_pass_that_is_interrupted_goes_on_where_it_stopped(tmp_path: Path, after: int) -> None:
    work = Work()

    def stop(pixels: torch.Tensor, view: int) -> list[torch.Tensor]:
        if len(work.made) == after:
            raise KeyboardInterrupt
        return work.make(pixels, view)

    with pytest.raises(KeyboardInterrupt):
        fill(work, IMAGES, [rows(tmp_path)], range(VIEWS), stop, "rows")
    rest = filled(tmp_path)
    assert len(rest.made) == len(PARTS) - after
    assert set(rest.made) | set(work.made) == {(v, p * SIZE) for v, p in PARTS}
    assert_right(tmp_path)


class Unreadable:
    """Images of which some have stand-ins, as Streaming gives them."""

    labels, bad = IMAGES.labels, {3, 21}

    def __len__(self) -> int:
        return COUNT

    def batches(self, order):
        for index in order:
            stood = index.clone()
            stood[[k for k, n in enumerate(index.tolist()) if n in self.bad]] = index[0]
            yield stood, IMAGES.pixels[stood]


def test_an_image_that_cannot_be_decoded_has_zeros(tmp_path: Path) -> None:
    work, kept = Work(), rows(tmp_path)
    fill(work, Unreadable(), [kept], range(VIEWS), work.make, "rows")
    for n in range(COUNT):
        row = kept.float32(2)[n].tolist()
        assert row == ([0.0] * WIDTH if n in Unreadable.bad else expected(2, n))


# -- processes -----------------------------------------------------------------------------------

# Fills argv[1]; argv[2] is what befalls it at its 6th part. Prints how many parts it computed.
SCRIPT = textwrap.dedent(
    """
    import os, resource, signal, sys, time
    from pathlib import Path
    from tests.shared.data import test_kept as t
    folder, fate = Path(sys.argv[1]), sys.argv[2]
    work, make = t.Work(), t.Work.make
    def fated(pixels, view):
        if len(work.made) == 5 and fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(work.made) == 5 and fate == "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        if fate == "slow":
            time.sleep(.05)
        return make(work, pixels, view)
    try:
        t.fill(work, t.IMAGES, [t.rows(folder)], range(t.VIEWS), fated, "rows")
    except OSError as error:
        print(error)
    print(len(work.made), *[line for line in work.said if "waiting" in line], sep="\\n")
    """
)


def run(folder: Path, fate: str):
    # what a fork prints goes to a file too, for which there is then no room
    start = python if fate == "full" else forked
    return start("-c", SCRIPT, str(folder), fate)


def test_a_pass_that_is_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    assert run(tmp_path, "killed").returncode == -9
    assert len(filled(tmp_path).made) == len(PARTS) - 5
    assert_right(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_what_was_computed(tmp_path: Path) -> None:
    """A limit on file size stands in for it: a short write, then a system error."""
    done = run(tmp_path, "full")
    line, made = done.stdout.splitlines()
    assert line == f"{tmp_path / 'rows'}: cannot be written (File too large); " + (
        "what was computed so far stands"
    )
    assert len(filled(tmp_path).made) == len(PARTS) - (int(made) - 1)
    assert_right(tmp_path)


def test_a_second_process_waits_and_computes_nothing_twice(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: run(tmp_path, "slow"), range(2)))
    outputs = [d.stdout.splitlines() for d in done]
    assert sum(int(lines[0]) for lines in outputs) == len(PARTS), [d.stderr for d in done]
    assert_right(tmp_path)


def test_ranks_share_the_parts(tmp_path: Path) -> None:
    """Two ranks one after the other, each with its own half, as two processes have at once."""
    halves = []
    for rank in range(2):
        work = Work()
        work = SimpleNamespace(rank=rank, world=2, device=work.device, say=work.say, make=work.make,
                               made=work.made, broadcast=lambda value: value,
                               gather=lambda local: local)  # fmt: skip
        if rank == 1:
            assert not rows(tmp_path).whole()
        fill(work, IMAGES, [rows(tmp_path)], range(VIEWS), work.make, "rows")
        halves.append(set(work.made))
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == len(PARTS)
    assert_right(tmp_path)
