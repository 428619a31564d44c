"""Paired HR and LR views: counter-keyed augmentations, in batches.

A training view of an image is one of `Views.count` = flips x shifts, or with Data.crop "resized" a
random part of it; which one an image gets in an epoch is a function of (seed, epoch, image). HR and
LR share it, and LR is made from the HR view (of the whole picture, where the teacher sees its box).
Images that fit stay in memory as uint8; others are decoded by worker processes. There is no
Python per resident image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from shared import degrade
from shared.config import Data
from shared.data import crops
from shared.data.items import Items, Subset, fit
from shared.data.kept import Rows
from shared.data.samplers import Sampler
from shared.degrade import low, to_float, to_uint8

PART = 16  # images that a decoding thread takes at a time
LR_TABLE_BYTES = 1 << 30  # every LR view is kept when all of them fit into this


class Images(Protocol):
    """uint8 RGB images of one size, by number."""

    labels: Tensor  # [N] int64

    def __len__(self) -> int: ...

    def batches(self, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each tensor of image numbers [B]: the numbers and the images [B, 3, S, S] uint8.

        The numbers come back other than they went in only where an image could not be decoded
        and another one of the batch stands in for it.
        """
        ...


class Resident:
    """Images in memory (or memory-mapped)."""

    def __init__(self, pixels: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
        self.pixels = torch.as_tensor(np.array(pixels) if isinstance(pixels, np.memmap) else pixels)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        if self.pixels.dtype != torch.uint8 or self.pixels.dim() != 4:
            raise ValueError(f"images must be uint8 [N,3,S,S], not {self.pixels.dtype}")

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for index in order:
            yield index, self.pixels[index.to(self.pixels.device)]

    def to(self, device: torch.device) -> Resident:
        self.pixels = self.pixels.to(device)
        return self


class Streaming:
    """Images decoded from files by worker processes, in the order asked for.

    decode: image number -> uint8 [3, S, S], ValueError naming the file if it cannot; picklable.
    on_error: "stop" raises that error; "skip" counts it in `skipped` and lets another image of
    the batch stand in.
    """

    def __init__(
        self, decode: Callable[[int], Tensor], labels: Tensor, *, workers: int, on_error: str
    ) -> None:
        self.decode, self.labels = decode, labels
        self.workers, self.on_error = workers, on_error
        self.skipped: dict[int, str] = {}  # number: why

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for index, images in zip(order, self._decoded(order), strict=True):
            good = [k for k, image in enumerate(images) if isinstance(image, Tensor)]
            bad = [k for k, image in enumerate(images) if not isinstance(image, Tensor)]
            if bad and (self.on_error == "stop" or not good):
                raise ValueError(images[bad[0]])
            self.skipped |= {int(index[k]): str(images[k]) for k in bad}
            rows = torch.arange(len(index))
            rows[bad] = torch.tensor(good[:1]).expand(len(bad))
            yield index[rows], torch.stack([images[k] for k in rows.tolist()])

    def _decoded(self, order: Sequence[Tensor]) -> Iterator[list[Tensor | str]]:
        """Images or messages of each part: read ahead by processes, one part alone by threads."""
        decoded = _Decoded(self.decode)
        if len(order) == 1:  # a batch that somebody asks for: processes would start anew each time
            with ThreadPoolExecutor(max(1, self.workers)) as pool:
                yield list(pool.map(decoded.__getitem__, order[0].tolist()))
            return
        yield from torch.utils.data.DataLoader(
            decoded,
            batch_sampler=[index.tolist() for index in order],
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            collate_fn=list,
        )


class Part:
    """Some of other images, by their `numbers` int64 [M], each once; they count from 0 here."""

    def __init__(self, images: Images, numbers: Tensor) -> None:
        self.images, self.numbers = images, torch.as_tensor(numbers)
        self.labels = images.labels[self.numbers]
        self._place = torch.empty(len(images), dtype=torch.int64)
        self._place[self.numbers] = torch.arange(len(self.numbers))

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for index, pixels in self.images.batches([self.numbers[wanted] for wanted in order]):
            yield self._place[index], pixels


class Centred:
    """The middle `size` x `size` px of other images: what is scored, where views are crops."""

    def __init__(self, images: Images, size: int) -> None:
        self.images, self.size, self.labels = images, size, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for index, pixels in self.images.batches(order):
            yield index, centre(pixels, self.size)


Pictures = TypeVar("Pictures", Tensor, np.ndarray)


def centre(pixels: Pictures, size: int) -> Pictures:
    """The middle `size` x `size` px of pictures [.., H, W]."""
    top, left = ((side - size) // 2 for side in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]


def prepared(
    items: Items,
    data: Data,
    size: int,
    *,
    whole: bool = False,
    role: Literal["training", "held out", "protocol"] = "protocol",
) -> tuple[Images, list[str]]:
    """Items as images of `size` px (shared.data.items.fit), and why some were left out.

    Where views are crops (Data.kept above Data.hr), a picture is brought to as much more px: all of
    it, whatever its shape, or for Data.crop "resized" its centre square. A training image stays so,
    of others it is the centre. `whole`: small, tight crops, which are taken whole and leave no
    room.

    In memory where they fit into `data.resident_gib`, decoded by `data.workers` threads; else
    decoded by as many processes when they are asked for. What cannot be decoded is a ValueError, or
    with `data.on_error` "skip" it is left out; a streamed training image has a stand-in (see
    Streaming), an evaluation has none, so there every image is looked at first. A protocol names
    images by number and cannot miss one: it always stops.
    """
    skip = role != "protocol" and data.on_error == "skip"
    hint = "" if skip or role == "protocol" else "; --data.on-error skip leaves such images out"
    room = 0 if whole else data.kept - data.hr
    all_of_it = room > 0 and data.crop != "resized"
    shown = size + room if role == "training" else size
    streamed = len(items) * 3 * shown * shown > data.resident_gib * 2**30
    left_out: list[str] = []
    if streamed and skip and role == "held out":
        fine, left_out = _each(items, data, lambda number: items.image(number), skip)
        items = Subset(items, fine, items.labels[fine])
    decode = functools.partial(_fitted, items, size + room, whole or all_of_it, shown, hint)
    labels = torch.as_tensor(items.labels)
    if streamed:
        on_error = "skip" if skip else "stop"
        return Streaming(decode, labels, workers=data.workers, on_error=on_error), left_out
    pixels = torch.empty((len(items), 3, shown, shown), dtype=torch.uint8)

    def place(number: int) -> None:
        pixels[number] = decode(number)

    fine, left_out = _each(items, data, place, skip)
    if left_out:
        pixels, labels = pixels[torch.as_tensor(fine)], labels[torch.as_tensor(fine)]
    return Resident(pixels, labels), left_out


def _each(
    items: Items, data: Data, do: Callable[[int], object], skip: bool
) -> tuple[np.ndarray, list[str]]:
    """Numbers for which `do` raised no ValueError, and the messages of the others."""

    def part(numbers: range) -> list[str]:
        found = []
        for number in numbers:
            try:
                do(number)
                found.append("")
            except ValueError as error:
                if not skip:
                    raise
                found.append(str(error))
        return found

    failed: list[str] = []
    parts = [range(k, min(k + PART, len(items))) for k in range(0, len(items), PART)]
    bar = tqdm(desc="decoding", total=len(items), leave=False, disable=None, unit="image")
    with ThreadPoolExecutor(max(1, data.workers)) as pool, bar:
        try:
            for messages in pool.map(part, parts):
                failed += messages
                bar.update(len(messages))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failed and all(failed):
        raise ValueError(f"none of {len(items):,} images can be decoded; the first: {failed[0]}")
    fine = np.array([not message for message in failed], dtype=bool)
    return np.flatnonzero(fine), [message for message in failed if message]


def _fitted(items: Items, size: int, whole: bool, shown: int, hint: str, number: int) -> Tensor:
    try:
        return centre(fit(items.image(number), size, whole=whole), shown)
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None


class _Decoded(torch.utils.data.Dataset):
    """Errors travel as text: raised in a worker they would come back as a page of traces."""

    def __init__(self, decode: Callable[[int], Tensor]) -> None:
        self.decode = decode

    def __getitem__(self, number: int) -> Tensor | str:
        try:
            return self.decode(number)
        except ValueError as error:
            return str(error)


class Views:
    """The finite set of training views: flips x (2 * shift / step + 1)^2 shifts.

    View 0 .. count - 1; the identity (no flip, no shift) is `Views.identity`. Images have
    `Data.kept` px a side, views `Data.hr`. Where random parts of a picture are cut out (Data.crop
    "resized") these are drawn besides, see `cut`: the set is not `finite`, and has the flips of the
    centre only.
    """

    def __init__(self, data: Data) -> None:
        if data.shift < 0 or data.shift_step < 1:
            raise ValueError("data.shift must be 0 or more and data.shift_step 1 or more")
        self.finite, self.pad = data.crop != "resized", data.pad
        self.size, self.room = data.hr, data.kept - data.hr
        shift = data.shift if self.finite else 0
        if shift % data.shift_step:
            raise ValueError(
                f"data.shift {data.shift} is no multiple of data.shift_step {data.shift_step}"
            )
        self.padding = 0 if self.room else shift
        steps = torch.arange(-shift, shift + 1, data.shift_step)
        dy, dx = torch.meshgrid(steps, steps, indexing="ij")
        flips = 2 if data.flip else 1
        self.dy, self.dx = dy.reshape(-1).repeat(flips), dx.reshape(-1).repeat(flips)
        self.mirrored = torch.arange(flips).repeat_interleave(steps.numel() ** 2) == 1
        self.count = len(self.dy)
        self.identity = int(((self.dy == 0) & (self.dx == 0) & ~self.mirrored).nonzero()[0])

    def apply(self, pixels: Tensor, view: Tensor) -> Tensor:
        """pixels [B, 3, kept, kept] uint8, view [B] -> [B, 3, hr, hr] uint8, in channels-last."""
        if self.count == 1 and not self.room:
            return pixels
        height, width = (side - self.room for side in pixels.shape[-2:])
        p, device = self.padding, pixels.device
        first = p + self.room // 2
        view = view.to(device)
        if p:
            mode = "replicate" if self.pad == "edge" else "constant"
            # replication is not written for uint8; half the bytes of float32 hold it exactly
            wide = F.pad(pixels.half(), (p, p, p, p), mode=mode).to(torch.uint8)
        else:
            wide = pixels
        rows = torch.arange(height, device=device) + (first + self.dy.to(device)[view])[:, None]
        columns = torch.arange(width, device=device).expand(len(view), -1)
        columns = torch.where(self.mirrored.to(device)[view][:, None], width - 1 - columns, columns)
        columns = columns + (first + self.dx.to(device)[view])[:, None]
        which = torch.arange(len(view), device=device)[:, None, None]
        last = wide.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
        return last.permute(0, 3, 1, 2)

    def cut(self, pixels: Tensor, view: Tensor, key: Tensor) -> Tensor:
        """A random part of each picture, by its key [B] (shared.data.crops), flipped as the view
        says: [B, 3, kept, kept] uint8 -> [B, 3, hr, hr] uint8, in channels-last."""
        box = crops.boxes(key, pixels.shape[-1])
        return crops.resized(pixels, box, self.size, self.mirrored[view.cpu()])


@dataclass(frozen=True)
class Batch:
    """One step's images on this rank. Images are made when asked for: a student without a teacher
    costs no HR view, a teacher no LR one."""

    epoch: int
    last: bool  # of its epoch
    index: Tensor  # [B] which image
    view: Tensor  # [B] which view of it
    y: Tensor  # [B] label
    x_h: Callable[[], Tensor]  # -> [B, 3, hr, hr] normalised
    x_l: Callable[[], Tensor]  # -> [B, 3, lr_input, lr_input] normalised


class Loader:
    """Shuffled batches of paired views.

    Epoch e visits a permutation keyed by (seed, e), in `steps` whole batches of `size` over all
    ranks; what does not fill a batch is left for another epoch's order. Rank r sees the r-th
    contiguous part of each batch. No state: any (epoch, start) can be asked for. `sampler` orders
    the images of an epoch instead, in batches of its own size. whole: of the same images another
    picture, which the student sees in the same view (Data.quality "unlocalised").
    """

    def __init__(
        self,
        images: Images,
        data: Data,
        size: int,
        *,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        sampler: Sampler | None = None,
        whole: Images | None = None,
    ) -> None:
        if sampler is not None and size != sampler.size:
            raise ValueError(f"a batch of {size} is not the {sampler.size} images of the sampler's")
        if size % world:
            raise ValueError(f"a batch of {size} cannot be shared by {world} ranks")
        if size < 2 or len(images) < size:
            raise ValueError(f"{len(images)} training images do not fill a batch of {size}")
        if whole is not None and not torch.equal(whole.labels, images.labels):
            raise ValueError("whole pictures and their parts differ in number or labels")
        self.images, self.data, self.size, self.seed = images, data, size, seed
        self.device, self.rank, self.world = device, rank, world
        self.whole = whole
        self.seen = images if whole is None else whole  # by the student
        for some in (images, self.seen):
            if isinstance(some, Resident):
                some.to(device)
        self.views = Views(data)
        self.steps = len(images) // size if sampler is None else sampler.steps
        self.sampler = sampler
        self.kept_low: Rows | None = None  # every LR view, on disk
        self._low: Tensor | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on.

        Images from files are decoded ahead by worker processes; with `kept_low`, only if asked for.
        """
        order, view = self._order(epoch)
        drawn = None if self.views.finite else _distinct(order, len(self.images))
        own = self.size // self.world
        spans = [
            slice(s * self.size + self.rank * own, s * self.size + (self.rank + 1) * own)
            for s in range(start, self.steps)
        ]
        parts = [order[span] for span in spans]
        high = self._read(self.images, parts)
        low = None if self.whole is None else self._read(self.whole, parts)
        for step, span in enumerate(spans, start):
            index, read = next(high)
            key = None if drawn is None else degrade.keys(self.seed, drawn[span], epoch)
            moved = functools.cache(functools.partial(self._moved, read, view[span], key))
            seen = moved
            if low is not None:
                _, read = next(low)
                seen = functools.cache(functools.partial(self._moved, read, view[span], key))
            yield Batch(
                epoch=epoch,
                last=step == self.steps - 1,
                index=index,
                view=view[span],
                y=self.images.labels[index].to(self.device),
                x_h=functools.partial(self._x_h, moved),
                x_l=functools.partial(self._x_l, seen, index, view[span], epoch),
            )

    def plain(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """`count` images (default all) without augmentation: numbers [B], x_h, labels [B].

        In a shuffled order keyed by the seed, round and round where count exceeds the data set.
        """
        total = len(self.images)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
        count = total if count is None else count
        spans = list(order.repeat(-(-count // total))[:count].split(256))
        for index, pixels in self.images.batches(spans):
            pixels = pixels if not self.views.room else centre(pixels, self.data.hr)
            yield index, self._float(pixels.to(self.device)), self.images.labels[index]

    def low_view(self, pixels: Tensor, view: int) -> Tensor:
        """One view of images [B, 3, kept, kept] uint8 at LR: [B, 3, lr, lr] uint8."""
        chosen = torch.full((len(pixels),), view)
        return self._degrade(self.views.apply(pixels, chosen))

    # -- inside ----------------------------------------------------------------------------------

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        total = len(self.images)
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(total, generator=generator)
        if self.sampler is not None:
            order = self.sampler.order(epoch)
        view = torch.randint(self.views.count, (max(total, len(order)),), generator=generator)
        return order, view

    def _read(
        self, images: Images, parts: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Callable[[], Tensor]]]:
        """For each part its numbers, and what reads its pixels."""
        if self.kept_low is not None or not _streamed(images):
            for index in parts:
                yield index, functools.partial(self._pixels, images, index)
            return
        for index, pixels in images.batches(parts):
            yield index, functools.partial(pixels.to, self.device)

    def _pixels(self, images: Images, index: Tensor) -> Tensor:
        _, pixels = next(images.batches([index]))
        return pixels.to(self.device)

    def _moved(self, read: Callable[[], Tensor], view: Tensor, key: Tensor | None) -> Tensor:
        if key is None:
            return self.views.apply(read(), view)
        return self.views.cut(read(), view, key)

    def _x_h(self, moved: Callable[[], Tensor]) -> Tensor:
        return self._float(moved())

    def _x_l(
        self, seen: Callable[[], Tensor], index: Tensor, view: Tensor, epoch: int
    ) -> Tensor:
        d = self.data
        if d.quality == "unlocalised" and self.whole is None:
            raise ValueError(
                "--data.quality unlocalised: this training knows no whole pictures for its student"
            )
        if d.degradation == "realistic":
            key = degrade.keys(self.seed, index, epoch)
            pixels = to_uint8(self._realistic(to_float(seen()), key))
        elif (table := self._table()) is not None:
            pixels = table[index.to(table.device), view.to(table.device)]
        elif self.kept_low is not None:
            pixels = self.kept_low.read(view, index).to(self.device)
            pixels = pixels.view(len(index), 3, d.lr, d.lr)
        else:
            pixels = self._degrade(seen())
        return student_input(pixels, d)

    def _degrade(self, pixels: Tensor) -> Tensor:
        d = self.data
        return low(pixels, d.lr, mode=d.kernel, antialias=d.antialias)

    def _realistic(self, x: Tensor, key: Tensor) -> Tensor:
        d = self.data
        return degrade.realistic(x, d.lr, key, mode=d.kernel, antialias=d.antialias)

    @property
    def tabled(self) -> bool:
        """Whether every LR view is held in memory: where images are, there is a smaller image to
        keep, and all of them are small enough."""
        side = self.data.lr
        needed = len(self.seen) * self.views.count * 3 * side * side
        wanted = self.views.finite and side < self.data.hr and needed <= LR_TABLE_BYTES
        return isinstance(self.seen, Resident) and wanted

    def _table(self) -> Tensor | None:
        """Every LR view, uint8 [N, views, 3, lr, lr], if they are held: kept ones, else made."""
        side, pictures = self.data.lr, self.seen
        if self._low is None and isinstance(pictures, Resident) and self.tabled:
            table = torch.empty(
                (len(pictures), self.views.count, 3, side, side),
                dtype=torch.uint8,
                device=self.device,
            )
            numbers = torch.arange(len(pictures))
            for view in range(self.views.count):
                if self.kept_low is not None:
                    rows = self.kept_low.read(torch.full_like(numbers, view), numbers)
                    table[:, view] = rows.view(-1, 3, side, side).to(self.device)
                    continue
                for index in numbers.split(256):
                    pixels = pictures.pixels[index].to(self.device)
                    table[index.to(self.device), view] = self.low_view(pixels, view)
            self._low = table
        return self._low

    def _float(self, pixels: Tensor) -> Tensor:
        return normalise(pixels, self.data)


def _distinct(order: Tensor, total: int) -> Tensor:
    """Image numbers of an epoch, with `total` added each time that one comes again (small classes):
    it then shows another random part of itself."""
    grouped, places = order.sort(stable=True)
    again = torch.arange(len(order)) - torch.searchsorted(grouped, grouped)
    return order.index_add(0, places, total * again)


def _streamed(images: Images) -> bool:
    return _streamed(images.images) if isinstance(images, Part) else isinstance(images, Streaming)


def normalise(pixels: Tensor, data: Data) -> Tensor:
    """uint8 [B, 3, H, W] to float32, channels-last, with the data's mean and deviation."""
    scale = torch.tensor([1 / (255 * s) for s in data.std], device=pixels.device)
    shift = torch.tensor(
        [-m / s for m, s in zip(data.mean, data.std, strict=True)], device=pixels.device
    )
    x = pixels.to(torch.float32, memory_format=torch.channels_last)
    return x.mul_(scale[:, None, None]).add_(shift[:, None, None])


def enlarged(pixels: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] brought to size x size px as 8-bit files: bicubic, not antialiased."""
    x = F.interpolate(to_float(pixels), size=(size, size), mode="bicubic", align_corners=False)
    return to_uint8(x)


def student_input(pixels: Tensor, data: Data) -> Tensor:
    """uint8 LR [B, 3, lr, lr] to what the student's network gets: enlarged first, where it is."""
    if data.quality == "enlarged":
        pixels = enlarged(pixels, data.hr)
    return normalise(pixels, data)


def upsampled_input(pixels: Tensor, data: Data) -> Tensor:
    """uint8 HR to what a teacher gets of an LR image: degraded, then bicubic back to hr px."""
    x = low(pixels, data.lr, mode=data.kernel, antialias=data.antialias)
    return normalise(enlarged(x, data.hr), data)
