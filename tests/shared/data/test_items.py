"""Decoding and fitting against Pillow, and under truncation."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shared.config import Data
from shared.data import items
from shared.data.items import Boxed, Encoded, Files, check_counts, decode, fit
from shared.data.pipeline import Resident, Streaming, prepared


def picture(height: int = 20, width: int = 30, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


KINDS = [
    ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("PNG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True}), ("JPEG", "RGB", {"subsampling": 0}),
    ("PNG", "RGBA", {}), ("PNG", "P", {}), ("BMP", "RGB", {}), ("WEBP", "RGB", {}),
    ("PPM", "L", {}), ("TIFF", "RGB", {}),
]  # fmt: skip


@pytest.mark.parametrize("kind,mode,options", KINDS)
def test_decode_gives_pillows_rgb(kind: str, mode: str, options: dict) -> None:
    data = encoded(picture().convert(mode), kind, **options)
    found = decode(data, "x")
    assert found.dtype == np.uint8 and found.flags.writeable
    assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_image_is_named_never_half_grey(kind: str) -> None:
    data = encoded(picture(), kind)
    whole = decode(data, "x")
    for cut in range(len(data)):
        try:
            found = decode(data[:cut], "pack.rec#7")
        except ValueError as error:
            assert str(error).startswith("pack.rec#7: not a readable image (")
            assert "\n" not in str(error) and "/" not in str(error)
        else:  # a PNG has all pixels before its last checksums (4 + 4 bytes) and IEND (12)
            assert kind == "PNG" and cut >= len(data) - 20 and np.array_equal(found, whole)


def test_a_missing_file_and_an_absurd_size_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="gone.png: not a readable image .No such file"):
        decode(tmp_path / "gone.png")
    header = bytearray(encoded(picture(), "BMP"))
    header[18:26] = (9_000).to_bytes(4, "little") * 2  # says 9,000 x 9,000
    with pytest.raises(ValueError, match="bomb.bmp: .*9000 x 9000 pixels"):
        decode(bytes(header), "bomb.bmp")
    with pytest.raises(ValueError, match="no known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "x.eps")


def test_stray_bytes_between_markers_are_no_damage_and_a_corrupt_scan_is() -> None:
    data = encoded(picture(), "JPEG")
    stray = data[:-2] + b"\x12\x34\x56" + data[-2:]  # before the end marker
    assert np.array_equal(decode(stray, "x"), decode(data, "x"))
    tables = bytearray(data)
    at = tables.index(b"\xff\xc4") + 5  # counts of codes by length: more than there can be
    tables[at : at + 16] = b"\xff" * 16
    with pytest.raises(ValueError, match="^x: not a readable image"):
        decode(bytes(tables), "x")


@pytest.mark.parametrize("height,width", [(20, 30), (30, 20), (16, 16), (17, 16), (5, 9)])
def test_fit_is_pillows_resize_of_the_shorter_side_and_the_centre(height: int, width: int) -> None:
    image = picture(height, width)
    found = fit(np.asarray(image), 16)
    scale = 16 / min(height, width)
    wide, high = max(16, round(width * scale)), max(16, round(height * scale))
    left, top = (wide - 16) // 2, (high - 16) // 2
    resized = image.resize((wide, high), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((left, top, left + 16, top + 16)))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
    whole = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(fit(np.asarray(image), 16, whole=True).permute(1, 2, 0).numpy(), whole)


def test_prepared_is_the_same_resident_and_streaming(tmp_path) -> None:
    names = [f"{k}.png" for k in range(9)]
    for k, name in enumerate(names):
        picture(12 + k, 14, k).save(tmp_path / name)
    files = Files(tmp_path, names, np.arange(9) % 3)
    data = Data(workers=1)
    resident, skipped = prepared(files, data, 8)
    streaming, _ = prepared(files, replace(data, resident_gib=0.0, workers=0), 8)
    assert isinstance(resident, Resident) and isinstance(streaming, Streaming) and not skipped
    order = [torch.tensor([4, 0, 8]), torch.tensor([3])]
    for (i, a), (j, b) in zip(resident.batches(order), streaming.batches(order), strict=True):
        assert torch.equal(i, j) and torch.equal(a, b)
    assert resident.labels.tolist() == streaming.labels.tolist() == [0, 1, 2] * 3


def test_prepared_stops_at_or_skips_what_cannot_be_decoded(tmp_path) -> None:
    good = encoded(picture(8, 8), "PNG")
    mixed = Encoded("pack", [good, good[:50], good, b""], [5, 6, 7, 8])
    with pytest.raises(ValueError, match="pack#1: not a readable image"):
        prepared(mixed, Data(), 8)
    skip = Data(on_error="skip")
    with pytest.raises(ValueError, match="pack#1: "):  # a protocol can miss no image
        prepared(mixed, skip, 8)
    with pytest.raises(ValueError, match="pack#1: .*--data.on-error skip leaves such images out"):
        prepared(mixed, Data(), 8, role="training")
    for data in (skip, replace(skip, resident_gib=0.0, workers=0)):
        images, left_out = prepared(mixed, data, 8, role="held out")
        assert images.labels.tolist() == [5, 7] and len(images) == 2
        assert [message[:7] for message in left_out] == ["pack#1:", "pack#3:"]
        assert len(next(images.batches([torch.arange(2)]))[1]) == 2
    with pytest.raises(ValueError, match="none of 2 images can be decoded; the first: pack#0"):
        prepared(Encoded("pack", [b"", b""]), skip, 8, role="held out")


def test_items_travel_to_worker_processes(tmp_path) -> None:
    files = Files(tmp_path, ["a/b.png"], [3], np.array([[1.0, 2, 3, 4]]))
    copy = pickle.loads(pickle.dumps(files))
    assert copy.name(0) == "a/b.png" and copy.labels.tolist() == [3] and copy.boxes.shape == (1, 4)
    with pytest.raises(ValueError, match="1 files"):
        Files(tmp_path, ["a"], [1, 2])


def test_wrong_counts_are_listed_and_can_be_accepted(tmp_path) -> None:
    published = {"training images": 5864, "test images": 5924}
    found = {"training images": 5863, "test images": 5924}
    with pytest.raises(ValueError, match="CUB in .*: 5,863 training images instead of 5,864; "):
        check_counts("CUB", tmp_path, found, published, "published")
    check_counts("CUB", tmp_path, found, published, "any")
    check_counts("CUB", tmp_path, published, published, "published")


def test_a_jpeg_that_claims_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    data = bytearray(encoded(picture(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff" * 2  # 65,535 x 65,535: 12 GiB decoded
    with pytest.raises(ValueError, match="x.jpg: .*pixels"):
        decode(bytes(data), "x.jpg")
    assert 65535**2 > items.MOST_PIXELS > 8000 * 6000


# -- boxes ---------------------------------------------------------------------------------------


def cut(tmp_path, first: int, *boxes: tuple[float, ...]) -> Boxed:
    (tmp_path / "a.png").write_bytes(encoded(picture(), "PNG"))  # 20 rows, 30 columns
    files = Files(tmp_path, ["a.png"] * len(boxes), [0] * len(boxes), np.array(boxes))
    return Boxed(files, first)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "box", "rows", "columns"),
    [
        (0, (3, 2, 14, 9), (2, 9), (3, 14)),
        (1, (4, 3, 14, 9), (2, 9), (3, 14)),  # both ends counted from 1
        (0, (0, 0, 30, 20), (0, 20), (0, 30)),
        (1, (1, 1, 30, 20), (0, 20), (0, 30)),
        (0, (-4, -1, 5, 99), (0, 20), (0, 5)),  # what is in the picture
        (0, (2.4, 2.6, 7.4, 9.6), (3, 10), (2, 7)),  # rounded
        (1, (30, 20, 30, 20), (19, 20), (29, 30)),  # one pixel
    ],
)
def test_a_box_is_a_slice_of_the_picture(tmp_path, first, box, rows, columns) -> None:
    found = cut(tmp_path, first, box)
    whole = np.array(picture())
    assert np.array_equal(found.image(0), whole[slice(*rows), slice(*columns)])
    assert found.name(0) == "a.png" and len(found) == 1 and found.labels.tolist() == [0]
    assert np.array_equal(pickle.loads(pickle.dumps(found)).image(0), found.image(0))


@pytest.mark.parametrize(
    "box",
    [(30, 2, 40, 9), (3, 20, 9, 25), (-9, 2, 0, 9), (3, -9, 9, 0), (5, 5, 5.2, 9), (9, 5, 3, 9)],
)
def test_a_box_without_a_pixel_of_the_picture_is_named(tmp_path, box) -> None:
    found = cut(tmp_path, 0, (3, 2, 14, 9), box)
    words = r"a\.png: its box \(.*\) holds no pixel of the picture of 30 x 20 px$"
    with pytest.raises(ValueError, match=words):
        found.image(1)
    assert found.image(0).shape == (7, 11, 3)
    with pytest.raises(ValueError, match="a.png: its box"):
        prepared(found, Data(), 8)


def test_files_without_boxes_cannot_be_cut(tmp_path) -> None:
    with pytest.raises(ValueError, match="these images have no boxes"):
        Boxed(Files(tmp_path, ["a.png"], [0]), 0)
