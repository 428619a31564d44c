"""Rows that are computed once and kept on disk: memory-mapped, checked, gone on with if cut short.

A row belongs to a (view, image); PATH holds [views, images, width], sparse until it is written.
Rows come in parts of some images of one view. PATH.sums has 8 bytes for each part: 0, or 2^32 +
the CRC-32 of its bytes, written after them. Before rows are used every part is read and compared,
and what was not noted or does not agree is computed anew: so no order of writes has to reach the
disk, and neither a killed process nor a lost page leaves anything that is believed. The comparison
runs at about 1 GB/s (10 s for 10 GB on one core, shared by the ranks) if the disk does.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from shared.data.pipeline import Images
    from shared.run import Run

SAY_SECONDS = 30  # between two lines of progress where there is no terminal


class Rows:
    """[views, count, width] of `dtype` at `path`, in parts of `size` images. See `fill`."""

    def __init__(
        self, path: Path, views: int, count: int, width: int, dtype: torch.dtype, size: int
    ) -> None:
        self.path, self.sums = path, path.with_name(f"{path.name}.sums")
        self.views, self.count, self.dtype, self.size = views, count, dtype, size
        self.parts = -(-count // size)
        self.row = width * dtype.itemsize  # bytes
        self.nbytes = views * count * self.row

    def read(self, view: Tensor, index: Tensor) -> Tensor:
        """[B, width] of views [B] of images [B], on the CPU."""
        return torch.from_numpy(self._mapped[view.numpy(), index.numpy()]).view(self.dtype)

    def float32(self, view: int) -> np.ndarray:
        """[count, width] of one view, read-only: memory-mapped if it is float32, else widened."""
        rows = self._mapped[view]
        if self.dtype == torch.float32:
            return rows.view(np.float32)
        return torch.from_numpy(rows.copy()).view(self.dtype).float().numpy()

    def whole(self) -> bool:
        """Whether every part was written once; it is not compared here."""
        return bool(self._noted().all())

    def held(self) -> int:
        """Bytes that the file takes on disk so far."""
        return 512 * os.stat(self.path).st_blocks if self.path.is_file() else 0

    def create(self) -> None:
        """The file in its full size; what it holds stays."""
        with self._writing(self.path, "ab") as file:
            file.truncate(self.nbytes)
        self.sums.touch()

    def check(self, views: Sequence[int], parts: Sequence[int]) -> tuple[np.ndarray, int]:
        """(bool [views, parts]: what agrees with its checksum, how many others should have)."""
        noted = self._noted()[np.ix_(views, parts)]
        good = np.zeros(noted.shape, bool)
        with open(self.path, "rb") as file:
            for a, b in zip(*noted.nonzero(), strict=True):
                start, stop = self._span(views[a], parts[b])
                file.seek(start)
                good[a, b] = noted[a, b] == _sum(file.read(stop - start))
        return good, int((noted != 0).sum() - good.sum())

    def write(self, view: int, part: int, rows: Tensor) -> None:
        """rows [size, width]; of the last part those that there are images for are kept.

        Raises OSError, naming the file, when the disk is full; what was written before stands.
        """
        start, stop = self._span(view, part)
        rows = rows[: (stop - start) // self.row].to(self.dtype).contiguous()
        content = rows.view(torch.uint8).numpy().data
        with self._writing(self.path) as file:
            file.seek(start)
            file.write(content)
        with self._writing(self.sums) as file:
            file.seek(8 * (view * self.parts + part))
            file.write(struct.pack("<Q", _sum(content)))

    def _span(self, view: int, part: int) -> tuple[int, int]:
        first, last = part * self.size, min((part + 1) * self.size, self.count)
        return (view * self.count + first) * self.row, (view * self.count + last) * self.row

    def _noted(self) -> np.ndarray:
        length = 8 * self.views * self.parts
        found = self.sums.read_bytes() if self.sums.is_file() else b""
        noted = np.frombuffer(found[:length].ljust(length, b"\0"), "<u8")
        return noted.reshape(self.views, self.parts)

    @functools.cached_property
    def _mapped(self) -> np.ndarray:
        shape = (self.views, self.count, self.row)
        return np.asarray(np.memmap(self.path, np.uint8, "r", shape=shape))

    @contextlib.contextmanager
    def _writing(self, path: Path, mode: str = "r+b") -> Iterator:
        try:
            with open(path, mode) as file:
                yield file
        except OSError as error:
            raise OSError(
                f"{path}: cannot be written ({error.strerror}); what was computed so far stands"
            ) from None


def _sum(content: bytes | memoryview) -> int:
    return 1 << 32 | zlib.crc32(content)


def fill(
    run: Run,
    images: Images,
    kept: Sequence[Rows],
    views: Sequence[int],
    make: Callable[[Tensor, int], Sequence[Tensor]],
    what: str,
) -> None:
    """Check the rows of `views` and compute those that are missing or damaged.

    kept: files of one folder, in parts of one size. make(images [size, 3, S, S] uint8, view) -> the
    rows [size, width] of each file. An image is decoded once for all its missing views; the last
    part is filled up with the first images, so that every batch has the same size. Rows of an image
    that could not be decoded, and was not to stop the run, are zeros: no batch asks for them.

    Ranks share the parts and wait for each other; another process that wants the same folder waits
    for this one. Raises OSError when the disk is full: what was computed so far stands.
    """
    size, folder = kept[0].size, kept[0].path.parent
    with locked(folder, run.say) if run.rank == 0 else contextlib.nullcontext():
        if run.rank == 0:
            for rows in kept:
                rows.create()
        run.broadcast(None)  # nobody begins before that
        own = range(run.rank, kept[0].parts, run.world)
        checked = [rows.check(views, own) for rows in kept]
        missing = ~np.logical_and.reduce([good for good, _ in checked])
        todo = [own[k] for k in missing.any(0).nonzero()[0]]
        damaged, total = _over_ranks(run, sum(bad for _, bad in checked), int(missing.sum()))
        if damaged:
            run.say(f"{folder}: {damaged} damaged parts of {what} are computed anew")
        order = [torch.arange(part * size, (part + 1) * size) % len(images) for part in todo]
        began = said = time.monotonic()
        done, here = 0, int(missing.sum())
        bar = tqdm(desc=what, total=here * size * run.world, unit="image", leave=False,
                   disable=None if run.rank == 0 else True)  # fmt: skip
        batches = images.batches(order) if order else iter(())
        for part, asked, (came, pixels) in zip(todo, order, batches, strict=True):
            for a in missing[:, part // run.world].nonzero()[0]:
                for rows, made in zip(kept, make(pixels, views[a]), strict=True):
                    lost = (came != asked)[:, None]
                    rows.write(views[a], part, made.cpu().masked_fill(lost, 0))
                done += 1
                bar.update(size * run.world)
                now = time.monotonic()
                if bar.disable and now - said > SAY_SECONDS and done < here:
                    said, speed = now, done * size * run.world / (now - began)
                    left = (now - began) * (here - done) / done
                    run.say(f"{what}: {done / here:.0%}, {speed:,.0f} images/s, {left:,.0f} s left")
        bar.close()
        _over_ranks(run, 0, 0)  # rank 0 keeps the lock until all have written
        if total:
            seconds = time.monotonic() - began
            speed = total * size / seconds
            run.say(f"{what}: {seconds:.0f} s, {speed:,.0f} images/s, kept in {folder}")


def _over_ranks(run: Run, *counts: int) -> list[int]:
    """Sums over the ranks, which wait for each other."""
    mine = torch.tensor([counts], device=run.device)
    return run.gather(mine).sum(0).tolist()


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Only one process at a time is in here, for each folder; others wait, and say so."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that works in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
