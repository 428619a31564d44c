"""Face packs in MXNet's RecordIO (`train.rec`, `train.idx`, `property`), read without MXNet.

All little-endian. A record is one part, or several where its payload held the magic at a multiple
of 4: the writer cuts there and drops the magic, the reader puts it back. So a magic at a multiple
of 4 in the file always opens a part.

    part      uint32 magic, uint32 kind << 29 | length, then `length` bytes, zeros to a multiple of
              4; kind 0 is a whole record, 1, 2, 3 are the first, middle and last part of one
    payload   uint32 flag, float32 label, uint64 id, uint64 id2; with flag > 0 that many float32
              labels, of which the first counts; then the encoded image (JPEG, PNG)
    .idx      lines `key<tab>offset` in any order
    property  classes, height, width and, in some packs, the number of images

Dialects: in InsightFace's packs record 0 has no image and the labels [N + 1, N + 1 + identities];
keys 1..N are the images; each key from N + 1 on is an identity, without image, and its labels
[first, end) are the keys of its images. In the packs of im2rec and of InsightFace's Python builder
every record is an image. The missing image tells them apart, not the flag: images too may have
several labels ([label, aligned]).
"""

from __future__ import annotations

import os
import re
import struct
import warnings
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.utils.data import Dataset

from shared.data.items import decode

MAGIC = 0xCED7230A
MOST_LENGTH = 1 << 29  # of a part: the three bits above are its kind
MOST_LABEL = 1 << 24  # float32 holds every whole number up to here
HEADER = 24  # bytes before the labels and the image
LEAST_RECORD = 40  # bytes: a part's head, the header, two labels (or any image)


class RecordIODataset(Dataset[tuple[Tensor, int]]):
    """[i] -> (image uint8 [3, H, W] RGB at native size, label); also shared.data.items.Items.

    `folder` holds train.rec and, where the pack has them, train.idx and property; or it is the path
    of a .rec file, with a .idx of the same stem and property beside it. Images are in the order of
    their keys. Without .idx the file is scanned once and its images are numbered as they lie.

    labels   [N] int64. InsightFace packs: the images of an identity share the label that the
             headers of its first and last one agree on, so that two headers an identity are read;
             elsewhere, and in packs of more than 2^24 records, whose ranges float32 rounds, every
             header. No image is decoded for it.
    classes  of `property`, or without it the identities, or the highest label + 1
    aligned  the pack has InsightFace's identity records: its faces are 112 x 112 px crops, aligned
             when the pack was made

    Damage is a ValueError naming the file and the offset. On opening: an index that is no list of
    distinct keys and of distinct offsets inside the file; every header that is read (a record must
    end where the next one begins, and the last where the file ends); keys, identity ranges, labels
    and `property` that contradict each other. On access: the whole record, and its label against
    `labels`. Beyond detection: the bytes of an image, as far as its own format has no check (JPEG
    has none); where every record is an image, a label that became another class; and, if both .idx
    and the count in `property` are missing, records lost from the end.

    Picklable; every process opens the file for itself (after a fork it may share its parent's
    descriptor, which is read at given positions only).
    """

    def __init__(self, folder: str | Path) -> None:
        given = Path(folder).expanduser()
        self.path = given if given.suffix == ".rec" and not given.is_dir() else given / "train.rec"
        if not self.path.is_file():
            raise ValueError(
                f"{self.path}: no such file; name a folder with train.rec (and train.idx, property)"
            )
        self._file: FileIO | None = None
        size = self.path.stat().st_size
        if size < LEAST_RECORD or size % 4:
            raise ValueError(
                f"{self.path}: ends at offset {size}, inside a record: truncated, or no RecordIO"
            )
        words = np.memmap(self.path, dtype="<u4", mode="r")
        index: Path | None = self.path.with_suffix(".idx")
        if index and index.is_file():
            self._keys, self._starts = _read_index(index)
        else:
            index, self._starts = None, _scan(self.path, words)
            self._keys = np.arange(len(self._starts))
        self._ends = self._find_ends(index or self.path, size)

        first_labels, image_bytes, _ = self._headers(words, np.zeros(1, dtype=np.int64))
        self.aligned = not image_bytes[0]
        if self.aligned:
            self.labels, identities = self._labels_of_identities(words, first_labels)
        else:
            self.labels, identities = self._labels_of_images(words, index), 0
        self.classes = self._check_property(identities)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.image(i)).permute(2, 0, 1).contiguous(), int(self.labels[i])

    def image(self, i: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB. ValueError where the record is damaged or cannot be decoded."""
        payload = self._payload(i)
        flag = int.from_bytes(payload[:4], "little")
        begin = HEADER + 4 * flag
        if begin >= len(payload):
            raise self._damage(i, f"{len(payload)} bytes, too few for {flag} labels and an image")
        (label,) = struct.unpack_from("<f", payload, HEADER if flag else 4)
        if label != self.labels[i]:
            raise self._damage(i, f"its label is {label:g}, expected {self.labels[i]}")
        return decode(payload[begin:], self._where(i))

    def name(self, i: int) -> str:
        """File and key, such as train.rec#17."""
        return f"{self.path.name}#{self._keys[i]}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        file = getattr(self, "_file", None)  # absent where __init__ refused
        if file is not None:
            file.close()

    # -- opening ---------------------------------------------------------------------------------

    def _find_ends(self, index: Path, size: int) -> np.ndarray:
        """Where each record must end: at the next one's offset, or at the end of the file."""
        order = np.argsort(self._starts, kind="stable")
        starts = self._starts[order]
        following = np.append(starts[1:], size)
        room = following - starts
        bad = (starts % 4 != 0) | (room < LEAST_RECORD)
        bad[0] |= starts[0] != 0
        if bad.any():
            k = int(bad.argmax())
            raise ValueError(
                f"{index}: key {self._keys[order[k]]} at offset {starts[k]}: no record can lie "
                f"from there to {following[k]} ({self.path.name} has {size} bytes, its first "
                "record begins at 0): truncated, damaged, or the index of another file"
            )
        ends = np.empty_like(self._starts)
        ends[order] = following
        return ends

    def _headers(
        self, words: np.ndarray, numbers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First two labels [n, 2] float32, bytes of image [n], lower halves of the ids [n].

        The second label is one only in a record without image, whose least size holds two.
        """
        starts = self._starts[numbers]
        order = np.argsort(starts)  # a cold disk is read forwards
        rows = np.empty((len(starts), LEAST_RECORD // 4), dtype=np.uint32)
        rows[order] = sliding_window_view(words, rows.shape[1])[starts[order] // 4]
        length = rows[:, 1].astype(np.int64)
        whole = (rows[:, 0] == MAGIC) & (length < MOST_LENGTH)
        whole &= starts + 8 + length + -length % 4 == self._ends[numbers]
        for k in np.flatnonzero(~whole):  # rare: split, or damaged
            payload = self._payload(numbers[k])
            head = payload[: LEAST_RECORD - 8].ljust(LEAST_RECORD - 8, b"\0")
            rows[k, 2:], length[k] = np.frombuffer(head, dtype="<u4"), len(payload)
        flag = rows[:, 2].astype(np.int64)
        image_bytes = length - HEADER - 4 * flag
        if (image_bytes < 0).any():
            k = (image_bytes < 0).argmax()
            raise self._damage(numbers[k], f"{length[k]} bytes, too few for {flag[k]} labels")
        as_float = rows.view(np.float32)
        labels = np.stack([np.where(flag > 0, as_float[:, 8], as_float[:, 3]), as_float[:, 9]], 1)
        return labels, image_bytes, rows[:, 4]

    def _whole(self, values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """float32 labels, one or more a record, as int64."""
        good = (values >= 0) & (values <= MOST_LABEL) & (values == np.floor(values))
        if not good.all():
            k = np.argwhere(~good)[0]
            raise self._damage(
                numbers[k[0]],
                f"label {values[tuple(k)]}, must be a whole number from 0 to 2^24 (beyond it "
                "float32 skips numbers)",
            )
        return values.astype(np.int64)

    def _labels_of_images(self, words: np.ndarray, index: Path | None) -> np.ndarray:
        numbers = np.arange(len(self._keys))
        labels, image_bytes, ids = self._headers(words, numbers)
        if not image_bytes.all():
            raise self._damage(image_bytes.argmin(), "no image, unlike the pack's first record")
        # The usual writers repeat the key as id; then a few that differ are damage of either.
        odd = np.flatnonzero(ids != self._keys)
        if index and 0 < len(odd) < len(numbers) / 2:
            raise self._damage(
                odd[0],
                f"its id is {ids[odd[0]]}, while most records have their key: either is damaged "
                f"(without {index.name} the images are numbered as they lie)",
            )
        return self._whole(labels[:, 0], numbers)

    def _labels_of_identities(
        self, words: np.ndarray, first_labels: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """Labels of the images, which are all that is kept, and the number of identities."""
        zero = np.zeros(1, dtype=np.int64)
        records = len(self._keys)
        if records > MOST_LABEL:
            return self._labels_beyond_float32(words, first_labels[0])
        first, end = self._whole(first_labels, zero)[0]
        if not 2 <= first < end == records or (self._keys != np.arange(records)).any():
            raise self._damage(
                0,
                f"it says images 1 to {first - 1} and identities {first} to {end - 1}; the keys "
                f"found are {records}, from {self._keys[0]} to {self._keys[-1]}: the pack is "
                "damaged, or the index incomplete or of another file",
            )
        numbers = np.arange(first, end)
        ranges, image_bytes, _ = self._headers(words, numbers)
        if image_bytes.any():
            raise self._damage(numbers[image_bytes.argmax()], "an identity with an image")
        begins, ends = self._whole(ranges, numbers).T
        order = np.argsort(begins, kind="stable")
        bad = (begins[order] != np.append(1, ends[order][:-1])) | (ends <= begins)[order]
        bad[-1] |= ends[order[-1]] != first
        if bad.any():
            k = order[bad.argmax()]
            raise self._damage(
                numbers[k],
                f"images {begins[k]} to {ends[k] - 1}: the identities' ranges must follow one "
                f"another from 1 to {first - 1}",
            )
        edges = np.concatenate([begins, ends - 1])
        labels, image_bytes, _ = self._headers(words, edges)
        if not image_bytes.all():
            raise self._damage(edges[image_bytes.argmin()], "an image without image")
        of_first, of_last = self._whole(labels[:, 0], edges).reshape(2, -1)
        if (of_first != of_last).any():
            k = int((of_first != of_last).argmax())
            raise self._damage(
                numbers[k],
                f"images {begins[k]} to {ends[k] - 1} are one identity, but the labels of the "
                f"first and the last are {of_first[k]} and {of_last[k]}",
            )
        images = slice(1, first)
        self._keys, self._starts = self._keys[images], self._starts[images]
        self._ends = self._ends[images]
        return np.repeat(of_first[order], (ends - begins)[order]), len(numbers)

    def _labels_beyond_float32(
        self, words: np.ndarray, first_labels: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """As `_labels_of_identities`, for packs whose ranges float32 has rounded (Glint360K).

        Where the identity records begin is looked for near the rounded number, and every image's
        own header is read.
        """
        records, rounding = len(self._keys), len(self._keys) // MOST_LABEL
        told = first_labels.astype(np.float64)
        if abs(told[1] - records) <= rounding and 1 < told[0] < records + rounding:
            about = int(told[0])
            near = np.arange(max(1, about - rounding), min(records, about + rounding + 1))
            _, image_bytes, _ = self._headers(words, np.append(near[0] - 1, near))
            begins = (image_bytes[1:] == 0) & (image_bytes[:-1] > 0)
            if begins.any() and (self._keys == np.arange(records)).all():
                first = int(near[begins.argmax()])
                rest = np.arange(first, records)
                if not self._headers(words, rest)[1].any():
                    images = slice(1, first)
                    self._keys, self._starts = self._keys[images], self._starts[images]
                    self._ends = self._ends[images]
                    return self._labels_of_images(words, None), len(rest)
        raise self._damage(
            0,
            f"it says images up to about {told[0]:.0f} and identities up to {told[1]:.0f}; the "
            f"keys found are {records}, and no identity records lie between: the pack is damaged, "
            "or the index incomplete or of another file",
        )

    def _check_property(self, identities: int) -> int:
        """The number of classes, once labels and counts agree with it. identities: 0, not known."""
        path = self.path.with_name("property")
        highest = int(self.labels.max())
        classes = identities or highest + 1
        if path.is_file():
            text = path.read_bytes()[:200].strip().decode("ascii", "replace")
            fields = re.split(r"\s*[,\s]\s*", text)
            if len(fields) not in (3, 4) or not all(re.fullmatch(r"\d{1,9}", f) for f in fields):
                raise ValueError(f"{path}: {text[:40]!r}, expected classes,height,width[,images]")
            classes = int(fields[0])
            if len(fields) == 4 and int(fields[3]) != len(self.labels):
                raise ValueError(
                    f"{path}: {fields[3]} images, but {self.path} has {len(self.labels)}: "
                    "truncated, or not of this pack"
                )
        if highest >= classes:
            k = int(self.labels.argmax())
            raise self._damage(k, f"label {highest}, but the pack has {classes} classes ({path})")
        # With more identities than classes (a class listed in several runs) labels must repeat.
        if identities and len(np.unique(self.labels)) < identities <= classes:
            raise ValueError(
                f"{self.path}: {identities} identities, but only {len(np.unique(self.labels))} "
                "labels in the headers of their first images: damaged"
            )
        return classes

    # -- one record ------------------------------------------------------------------------------

    def _payload(self, i: int) -> bytes:
        """The payload of a record, its parts joined by the magic, each of them checked."""
        at, end = int(self._starts[i]), int(self._ends[i])
        parts: list[bytes] = []
        while True:
            magic, lrec = struct.unpack("<II", self._read(i, at, 8))
            kind, length = lrec >> 29, lrec & (MOST_LENGTH - 1)
            stop = at + 8 + length + -length % 4
            if magic != MAGIC:
                raise self._damage(i, f"0x{magic:08x} instead of the magic at offset {at}")
            if kind not in ((2, 3) if parts else (0, 1)) or (kind in (1, 2) and length % 4):
                raise self._damage(i, f"the part at offset {at} has kind {kind}, length {length}")
            if stop > end or (kind in (0, 3) and stop != end):
                raise self._damage(
                    i,
                    f"the part at offset {at} has length {length} and ends at {stop}, but the next "
                    f"record (or the end of the file) is at {end}",
                )
            body = self._read(i, at + 8, stop - at - 8)
            if any(body[length:]) or MAGIC in np.frombuffer(body, dtype="<u4"):
                raise self._damage(i, f"the part at offset {at} has a false length {length}")
            parts.append(body[:length])
            if kind in (0, 3):
                return struct.pack("<I", MAGIC).join(parts)
            at = stop

    def _read(self, i: int, at: int, size: int) -> bytes:
        file = self._file
        if file is None:
            file = self._file = FileIO(self.path)
        data = os.pread(file.fileno(), size, at)
        if len(data) < size:
            raise self._damage(i, f"the file ends at offset {at + len(data)}: truncated")
        return data

    def _where(self, i: int | np.integer) -> str:
        return f"{self.path}: key {self._keys[i]} at offset {self._starts[i]}"

    def _damage(self, i: int | np.integer, finding: str) -> ValueError:
        return ValueError(f"{self._where(i)}: {finding}")


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys [n] in ascending order, and the offsets [n] of their records."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy's word for an empty file is a warning
            table = np.loadtxt(path, dtype=np.int64, comments=None, ndmin=2, encoding="ascii")
        if table.shape[1] != 2:
            raise ValueError(f"{table.shape[1]} columns")
    except (ValueError, UserWarning) as error:
        finding = str(error).split("\n")[0][:80]
        raise ValueError(
            f"{path}: not lines of key<tab>offset ({finding}); without this file the records are "
            "found by scanning"
        ) from None
    keys, starts = table[np.argsort(table[:, 0], kind="stable")].T
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice) or keys[0] < 0:
        k = twice[0] if len(twice) else 0
        finding = "stands in it twice" if len(twice) else "is negative"
        raise ValueError(f"{path}: key {keys[k]} at offset {starts[k]} {finding}: damaged")
    return np.ascontiguousarray(keys), np.ascontiguousarray(starts)


def _scan(path: Path, words: np.ndarray) -> np.ndarray:
    """Offsets of the records of a file without .idx, in the order of keys.

    Keys follow the file, as in the index that MXNet's own tool rebuilds; except that in an
    InsightFace pack record 0, which its writer puts behind the images, comes to the front.
    """
    block = 1 << 22
    found, without_image = [], []
    for begin in range(0, len(words) - 2, block):
        part = np.asarray(words[begin : begin + block + 2])
        at = np.flatnonzero(part[:-2] == MAGIC)
        at = at[part[at + 1] >> 29 < 2]  # whole, or the first part of one
        found.append(begin + at)
        without_image.append((part[at + 1] == HEADER + 8) & (part[at + 2] == 2))
    starts, empty = np.concatenate(found), np.concatenate(without_image)
    if not len(starts):
        raise ValueError(f"{path}: no record from offset 0 on: not RecordIO")
    if empty.any():
        others = np.flatnonzero(empty)
        images = np.count_nonzero(~empty)
        labels = words[np.minimum(starts[others] + 8, len(words) - 1)].view("<f4")
        zero = labels == images + 1
        if np.count_nonzero(zero) != 1:
            raise ValueError(
                f"{path}: {images} records with an image and {len(others)} without, from offset "
                f"{starts[others[0]] * 4} on, but none of these says {images} images: truncated or "
                "damaged"
            )
        starts = starts[np.concatenate([others[zero], np.flatnonzero(~empty), others[~zero]])]
    return starts * 4
