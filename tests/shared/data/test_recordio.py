"""Every pack here is written by `part`, `record` and `header` below: struct.pack from the format's
description, nothing of the reader."""

import io
import multiprocessing
import pickle
import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from shared.data import recordio
from shared.data.recordio import RecordIODataset

MAGIC = bytes.fromhex("0a23d7ce")


def part(kind, body):
    head = MAGIC + struct.pack("<I", kind * 2**29 + len(body))
    return head + body + bytes(-len(body) % 4)


def record(payload):
    """Cut at every 4-byte word that is the magic; the last piece takes the odd bytes."""
    pieces, begin = [], 0
    for at in range(0, len(payload), 4):
        if payload[at : at + 4] == MAGIC:
            pieces.append(payload[begin:at])
            begin = at + 4
    if not pieces:
        return part(0, payload)
    middle = b"".join(part(2, piece) for piece in pieces[1:])
    return part(1, pieces[0]) + middle + part(3, payload[begin:])


def header(label, number=0, other=0):
    """label: a number (flag 0), or a list (flag: how many)."""
    if isinstance(label, list):
        head = struct.pack("<IfQQ", len(label), 0.0, number, other)
        return head + struct.pack(f"<{len(label)}f", *label)
    return struct.pack("<IfQQ", 0, label, number, other)


def write(folder, payloads, property_="3,4,4\n", index="listed"):
    """payloads: (key, payload) in the order of the file. Returns each key's offset."""
    folder.mkdir(exist_ok=True)
    content, offsets = b"", {}
    for key, payload in payloads:
        offsets[key] = len(content)
        content += record(payload)
    (folder / "train.rec").write_bytes(content)
    lines = [f"{key}\t{offset}\n" for key, offset in offsets.items()]
    if index == "shuffled":
        random.Random(0).shuffle(lines)
    if index:
        (folder / "train.idx").write_text("".join(lines))
    if property_:
        (folder / "property").write_text(property_)
    return offsets


def pixels(n, size=4):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def encoded(image, format_="PNG"):
    out = io.BytesIO()
    Image.fromarray(image).save(out, format=format_)
    return out.getvalue()


def insightface(images, per_identity=(3, 1, 2), first=True, label=float):
    """(key, payload); `first`: record 0 leads the file, else it follows the images."""
    n, identities = len(images), len(per_identity)
    labels = [k for k, count in enumerate(per_identity) for _ in range(count)]
    zero = [(0, header([n + 1.0, n + 1.0 + identities], 0))]
    shown = [(i + 1, header(label(labels[i]), i + 1) + images[i]) for i in range(n)]
    ends = [sum(per_identity[: k + 1]) + 1.0 for k in range(identities)]
    ranges = [
        (n + 1 + k, header([ends[k] - per_identity[k], ends[k]], n + 1 + k))
        for k in range(identities)
    ]
    return (zero + shown if first else shown + zero) + ranges


def im2rec(images, labels=(0, 0, 0, 1, 2, 2), label=float, first=0):
    return [(first + i, header(label(labels[i]), first + i) + im) for i, im in enumerate(images)]


LABELS = [0, 0, 0, 1, 2, 2]
DIALECTS = {
    "insightface": lambda images: insightface(images),
    "insightface, record 0 behind the images": lambda images: insightface(images, first=False),
    "insightface, [label, aligned]": lambda images: insightface(images, label=lambda k: [k, 1.0]),
    "im2rec": lambda images: im2rec(images),
    "im2rec, part of a list": lambda images: im2rec(images, first=40),
    "im2rec, several labels": lambda images: im2rec(images, label=lambda k: [k, 0.5, -3.0]),
    "builder": lambda images: im2rec(images),
}


def items(dataset):
    """[(name, bytes of the image, label)]"""
    named = ((dataset.name(i), *dataset[i]) for i in range(len(dataset)))
    return [(name, image.numpy().tobytes(), label) for name, image, label in named]


def open_all(folder):
    dataset = RecordIODataset(folder)
    return items(dataset), dataset.labels.tolist()


# -- the format ----------------------------------------------------------------------------------


def test_record_0_of_a_pack_is_the_published_vector(tmp_path):
    vector = bytes.fromhex(
        "0a23d7ce 20000000 02000000 00000000 00000000 00000000 01000000 00000000 0000a040 0000e040"
    )
    assert record(header([5.0, 7.0], 0, 1)) == vector  # the writer of these tests
    shots = pixels(4)
    payloads = insightface([encoded(p) for p in shots], (2, 2))
    payloads[0] = (0, vector[8:])
    write(tmp_path, payloads, "2,4,4\n")
    assert (tmp_path / "train.rec").read_bytes().startswith(vector)
    dataset = RecordIODataset(tmp_path)
    assert (len(dataset), dataset.classes, dataset.labels.tolist()) == (4, 2, [0, 0, 1, 1])


@pytest.mark.parametrize("index", ["listed", "shuffled", None])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_images_in_order_of_keys(tmp_path, dialect, index):
    shots = pixels(6)
    write(tmp_path, DIALECTS[dialect]([encoded(p) for p in shots]), index=index)
    before = sorted(p.name for p in tmp_path.iterdir())
    dataset = RecordIODataset(tmp_path)
    assert len(dataset) == 6 and dataset.classes == 3
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == LABELS
    assert dataset.aligned == dialect.startswith("insightface")
    for i in (5, 0, 3, 1, 4, 2):
        image, label = dataset[i]
        assert image.dtype == torch.uint8 and image.shape == (3, 4, 4) and type(label) is int
        assert np.array_equal(image.permute(1, 2, 0).numpy(), shots[i]) and label == LABELS[i]
        assert np.array_equal(dataset.image(i), shots[i])
    first = 1 if dataset.aligned else 40 if "part" in dialect and index else 0
    assert [dataset.name(i) for i in range(6)] == [f"train.rec#{first + i}" for i in range(6)]
    with pytest.raises(IndexError):
        dataset[6]
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # no .idx left beside the data


def test_keys_not_places_in_the_file_decide_the_order(tmp_path):
    shots = pixels(6)
    payloads = insightface([encoded(p) for p in shots])
    random.Random(1).shuffle(payloads)
    write(tmp_path, payloads)
    dataset = RecordIODataset(tmp_path)
    assert [dataset.name(i) for i in range(6)] == [f"train.rec#{i + 1}" for i in range(6)]
    assert np.array_equal(np.stack([dataset.image(i) for i in range(6)]), shots)
    assert dataset.labels.tolist() == LABELS


def test_ids_that_do_not_repeat_the_keys_are_no_damage(tmp_path):
    shots = pixels(6)
    payloads = [(3 * i + 1, header(float(i % 3), 0) + encoded(shots[i])) for i in range(6)]
    write(tmp_path, payloads)
    dataset = RecordIODataset(tmp_path)
    assert [dataset.name(i) for i in (0, 5)] == ["train.rec#1", "train.rec#16"]
    assert np.array_equal(dataset.image(5), shots[5])


def test_jpeg_is_rgb_and_sizes_are_native(tmp_path):
    red = np.zeros((20, 12, 3), np.uint8)
    red[..., 0] = 255
    write(tmp_path, im2rec([encoded(red, "JPEG")] * 3, (0, 1, 2)))
    image, _ = RecordIODataset(tmp_path)[1]
    assert image.shape == (3, 20, 12)
    assert image[0].min() > 250 and image[1:].max() < 5


def test_a_rec_file_may_be_named(tmp_path):
    write(tmp_path, im2rec([encoded(p) for p in pixels(6)]))
    for name in ("train.rec", "train.idx"):
        (tmp_path / name).rename(tmp_path / name.replace("train", "val"))
    dataset = RecordIODataset(str(tmp_path / "val.rec"))
    assert len(dataset) == 6 and dataset.name(2) == "val.rec#2"
    with pytest.raises(ValueError, match=r"train\.rec: no such file"):
        RecordIODataset(tmp_path)


def bitmap(words):
    """An uncompressed BMP 4 pixels wide whose pixel data are these words (3 a row), 56 bytes in."""
    data = b"".join(words)
    info = struct.pack("<IiiHHIIiiII", 40, 4, len(words) // 3, 1, 24, 0, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 56 + len(data), 0, 0, 56) + info + b"\0\0" + data


def rows_of(words):
    stored = np.frombuffer(b"".join(words), np.uint8).reshape(-1, 4, 3)
    return stored[::-1, :, ::-1]  # BMP: bottom row first, BGR


SPLITS = {
    "in the middle": [b"abcd", MAGIC, b"efgh"],
    "at the end": [b"abcd", b"efgh", MAGIC],
    "where the pixels start": [MAGIC, b"abcd", b"efgh"],
    "three running": [MAGIC] * 3,
    "across words, not to be cut": [b"ab" + MAGIC[:2], MAGIC[2:] + b"cd", b"efgh"],
}


@pytest.mark.parametrize("case", SPLITS)
def test_split_records_get_their_magic_back(tmp_path, case):
    words = SPLITS[case]
    number = struct.unpack("<Q", MAGIC * 2)[0]  # the id too: the first part ends inside the header
    payloads = [(key, header(1.0, n) + bitmap(words)) for key, n in ((0, 0), (1, number), (2, 2))]
    whole = words.count(MAGIC) == 0
    assert struct.unpack_from("<I", record(payloads[0][1]), 4)[0] >> 29 == (0 if whole else 1)
    for index in ("listed", None):
        folder = tmp_path / str(index)
        write(folder, payloads if index is None else payloads[::2], index=index)
        dataset = RecordIODataset(folder)
        assert dataset.labels.tolist() == [1] * len(dataset)
        for i in range(len(dataset)):
            assert np.array_equal(dataset.image(i), rows_of(words))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from([MAGIC, b"abcd", bytes(4), MAGIC[1:] + MAGIC[:1]]), min_size=3))
def test_any_mixture_of_magic_and_other_words_survives(tmp_path_factory, words):
    words = words[: len(words) // 3 * 3]
    folder = tmp_path_factory.mktemp("pack")
    write(folder, [(k, header(0.0, k) + bitmap(words)) for k in range(2)], index=None)
    assert np.array_equal(RecordIODataset(folder).image(1), rows_of(words))


@pytest.mark.parametrize("shift", [-3, -2, -1, 0, 1])
def test_scan_finds_records_at_the_border_of_its_blocks(tmp_path, shift):
    block = 1 << 24  # bytes, the scan's
    sizes = [block + 4 * shift, 400, block - 400, 44]  # of whole records
    parts = [part(0, header(float(k), k).ljust(size - 8, b"x")) for k, size in enumerate(sizes)]
    (tmp_path / "train.rec").write_bytes(b"".join(parts))
    assert RecordIODataset(tmp_path).labels.tolist() == [0, 1, 2, 3]


# -- workers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_two_workers_give_what_one_process_gives(tmp_path, context):
    write(tmp_path, insightface([encoded(p) for p in pixels(6)]))
    dataset = RecordIODataset(tmp_path)
    alone = [dataset[i] for i in range(6)]  # the parent has opened the file: workers need their own
    assert context in multiprocessing.get_all_start_methods()
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=context)
    for _ in range(2 if context == "fork" else 1):
        images, labels = (torch.cat(column) for column in zip(*loader, strict=True))
        assert torch.equal(images, torch.stack([image for image, _ in alone]))
        assert labels.tolist() == LABELS


def test_pickled_dataset_is_the_same_and_carries_no_descriptor(tmp_path):
    write(tmp_path, insightface([encoded(p) for p in pixels(6)]))
    dataset = RecordIODataset(tmp_path)
    expected = items(dataset)
    copy = pickle.loads(pickle.dumps(dataset))
    assert items(copy) == expected and items(dataset) == expected
    assert copy.classes == 3 and copy.aligned and np.array_equal(copy.labels, dataset.labels)


# -- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_labels_need_no_image_that_can_be_decoded(tmp_path, dialect):
    write(tmp_path, DIALECTS[dialect]([b"no image at all"] * 6))
    dataset = RecordIODataset(tmp_path)
    assert dataset.labels.tolist() == LABELS
    with pytest.raises(ValueError, match=r"train\.rec: key \d+ at offset \d+: not a readable im"):
        dataset[2]


def test_labels_come_from_headers_where_identities_are_in_another_order(tmp_path):
    """The list that made the pack was not sorted by label, and one class comes in two runs."""
    labels = [2, 2, 0, 1, 1, 2]
    payloads = insightface([encoded(p) for p in pixels(6)], (2, 1, 2, 1))
    for i, label in enumerate(labels):
        payloads[1 + i] = (i + 1, header(float(label), i + 1) + payloads[1 + i][1][24:])
    write(tmp_path, payloads)
    dataset = RecordIODataset(tmp_path)
    assert dataset.labels.tolist() == labels and [label for _, label in dataset] == labels
    (tmp_path / "property").write_text("4,4,4")  # four identities, so four labels are expected
    with pytest.raises(ValueError, match="4 identities, but only 3 labels"):
        RecordIODataset(tmp_path)


@pytest.mark.parametrize("value", [2.0**24 + 2, -1.0, 0.5, float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("dialect", ["im2rec", "im2rec, several labels", "insightface"])
def test_labels_that_float32_cannot_hold_or_are_no_numbers_are_refused(tmp_path, dialect, value):
    payloads = dict(DIALECTS[dialect]([b"no image at all"] * 6))
    odd = header([value, 0.0] if "several" in dialect else value, 3) + b"no image at all"
    offsets = write(tmp_path, list({**payloads, 3: odd}.items()), None)
    with pytest.raises(ValueError, match=rf"rec: key 3 at offset {offsets[3]}: label .* 2\^24"):
        RecordIODataset(tmp_path)


@pytest.mark.parametrize("off", [(0, 0), (1, -1), (-2, 2), (2, 0)])
def test_a_pack_too_large_for_float32_ranges_is_read_by_its_images(tmp_path, monkeypatch, off):
    """Glint360K has 17,091,657 images: beyond 2^24 record 0 and the ranges are rounded."""
    monkeypatch.setattr(recordio, "MOST_LABEL", 4)  # ten records: numbers may be off by two
    payloads = insightface([encoded(p) for p in pixels(6)], label=lambda k: [k, 1.0])
    payloads[0] = (0, header([7.0 + off[0], 10.0 + off[1]]))
    payloads[-1] = (9, header([4.0, 8.0], 9))  # a rounded range
    write(tmp_path, payloads)
    dataset = RecordIODataset(tmp_path)
    assert dataset.labels.tolist() == LABELS and len(dataset) == 6 and dataset.aligned
    assert [dataset[i][0].permute(1, 2, 0).numpy().tobytes() for i in range(6)] == [
        p.tobytes() for p in pixels(6)
    ]
    for told in ([7.0, 13.0], [4.0, 10.0], [float("nan"), 10.0], [10.0, 10.0]):
        write(tmp_path, [(0, header(told)), *payloads[1:]])
        with pytest.raises(ValueError, match="key 0 at offset 0: it says images up to about"):
            RecordIODataset(tmp_path)


def test_label_2_to_the_24_is_taken(tmp_path):
    write(tmp_path, im2rec([b"no image at all"] * 3, (0, 2**24, 5)), None)
    dataset = RecordIODataset(tmp_path)
    assert dataset.labels.tolist() == [0, 2**24, 5] and dataset.classes == 2**24 + 1


def test_label_beyond_the_classes_of_property_is_refused(tmp_path):
    for dialect in ("insightface", "im2rec"):
        offsets = write(tmp_path, DIALECTS[dialect]([b"no image at all"] * 6), "2,112,112")
        key = 5 if dialect == "insightface" else 4
        place = f"key {key} at offset {offsets[key]}"
        with pytest.raises(ValueError, match=rf"{place}: label 2, but the pack has 2 classes"):
            RecordIODataset(tmp_path)


@pytest.mark.parametrize(
    "text", ["3,112,112", "3,112,112\n", "3, 112, 112,6\n", "3,112,112\n6\n", None]
)
def test_property_as_it_is_found_in_packs(tmp_path, text):
    write(tmp_path, im2rec([b"no image at all"] * 6), text)
    assert RecordIODataset(tmp_path).classes == 3


@pytest.mark.parametrize(
    "text", ["", "3", "3,112", "3,112,112,7", "3,112,112\n5\n", "a,112,112", "3,112,112,6,1", "\0"]
)
def test_property_that_is_none_or_contradicts_the_pack_is_refused(tmp_path, text):
    write(tmp_path, im2rec([b"no image at all"] * 6), None)
    (tmp_path / "property").write_text(text)
    with pytest.raises(ValueError, match="property: "):
        RecordIODataset(tmp_path)


def test_classes_without_property(tmp_path):
    write(tmp_path, insightface([b"no image at all"] * 6), None)
    assert RecordIODataset(tmp_path).classes == 3


@pytest.mark.parametrize(
    ("key", "labels", "finding"),
    [
        (7, [1.0, 3.0], "ranges must follow one another"),  # leaves out image 3
        (8, [3.0, 5.0], "ranges must follow one another"),  # takes image 3 twice
        (9, [5.0, 6.0], "ranges must follow one another"),  # leaves out the last
        (9, [5.0, 9.0], "ranges must follow one another"),
        (8, [5.0, 5.0], "ranges must follow one another"),
        (8, [4.5, 5.0], "label 4.5"),
        (9, [-1.0, 7.0], "label -1.0"),
        (0, [7.0, 9.0], "images 1 to 6 and identities 7 to 8; the keys found are 10"),
        (0, [6.0, 10.0], "identity with an image"),
        (0, [8.0, 10.0], "ranges must follow one another"),
        (0, [1.0, 10.0], "images 1 to 0"),
        (0, [10.0, 10.0], "identities 10 to 9"),
        (0, [7.0, 2.0**30], "label 1073741824.0"),
    ],
)
def test_identity_ranges_that_cannot_be_are_refused(tmp_path, key, labels, finding):
    payloads = dict(insightface([b"no image at all"] * 6))
    write(tmp_path, list({**payloads, key: header(labels, key)}.items()))
    with pytest.raises(ValueError, match=rf"train\.rec: key \d+ at offset \d+.*{finding}"):
        RecordIODataset(tmp_path)


def test_an_identity_without_images_or_an_image_without_image_is_refused(tmp_path):
    payloads = dict(insightface([b"no image at all"] * 6))
    hollow = {8: header([4.0, 4.0], 8), 9: header([4.0, 7.0], 9)}  # the ranges still tile
    offsets = write(tmp_path, list({**payloads, **hollow}.items()))
    with pytest.raises(ValueError, match=f"key 8 at offset {offsets[8]}: images 4 to 3: .* ranges"):
        RecordIODataset(tmp_path)
    offsets = write(tmp_path, list({**payloads, 3: header([0.0, 1.0], 3)}.items()))
    with pytest.raises(ValueError, match=f"key 3 at offset {offsets[3]}: an image without image"):
        RecordIODataset(tmp_path)
    (tmp_path / "train.idx").unlink()
    with pytest.raises(ValueError, match=rf"{offsets[0]} on, but none of these says 5 images"):
        RecordIODataset(tmp_path)


def test_identities_need_not_stand_in_the_order_of_their_images(tmp_path):
    payloads = dict(insightface([encoded(p) for p in pixels(6)]))
    turned = {7: header([5.0, 7.0], 7), 8: header([1.0, 4.0], 8), 9: header([4.0, 5.0], 9)}
    write(tmp_path, list({**payloads, **turned}.items()))
    dataset = RecordIODataset(tmp_path)
    assert dataset.labels.tolist() == LABELS and [label for _, label in dataset] == LABELS


def test_identity_ranges_are_held_against_the_headers_of_images(tmp_path):
    payloads = dict(insightface([encoded(p) for p in pixels(6)]))
    shifted = {7: header([1.0, 3.0], 7), 8: header([3.0, 5.0], 8)}  # they tile, off by one
    offsets = write(tmp_path, list({**payloads, **shifted}.items()))
    place = f"key 8 at offset {offsets[8]}: images 3 to 4"
    with pytest.raises(ValueError, match=rf"{place} .* are 0 and 1"):
        RecordIODataset(tmp_path)
    inner = {2: header(1.0, 2) + encoded(pixels(1)[0])}  # not at the border of its range
    offsets = write(tmp_path, list({**payloads, **inner}.items()))
    dataset = RecordIODataset(tmp_path)
    assert dataset[0][1] == 0
    with pytest.raises(ValueError, match=rf"key 2 at offset {offsets[2]}: its label is 1, exp.* 0"):
        dataset[1]


# -- damage --------------------------------------------------------------------------------------


def lines(offsets):
    return "".join(f"{key}\t{offset}\n" for key, offset in offsets.items())


@pytest.mark.parametrize("dialect", ["insightface", "im2rec"])
def test_every_damaged_index_is_refused_or_harmless(tmp_path, dialect):
    shots = pixels(6)
    offsets = write(tmp_path, DIALECTS[dialect]([encoded(p) for p in shots]))
    expected = open_all(tmp_path)
    last = max(offsets)
    other = tmp_path / "other"
    other_offsets = write(other, DIALECTS[dialect]([encoded(p) for p in pixels(6, 5)]))
    damaged = {
        "empty": "",
        "blank": "\n\n",
        "words": "key\toffset\n",
        "one column": "".join(f"{key}\n" for key in offsets),
        "three columns": "".join(f"{key}\t{offset}\t0\n" for key, offset in offsets.items()),
        "float": lines(offsets).replace("0\t0", "0\t0.0"),
        "nul bytes": "\0" * 64,
        "not ASCII": lines(offsets) + "é",
        "key twice": lines(offsets) + f"2\t{offsets[2]}\n",
        "two keys, one offset": lines({**offsets, 2: offsets[3]}),
        "into the middle of a record": lines({**offsets, 2: offsets[2] + 16}),
        "unaligned": lines({**offsets, 2: offsets[2] + 1}),
        "negative key": lines(offsets).replace("0\t0\n", "-1\t0\n"),
        "negative offset": lines({**offsets, 2: -40}),
        "most negative offset": lines({**offsets, 2: -(2**63)}),
        "at the end": lines({**offsets, 2: (tmp_path / "train.rec").stat().st_size}),
        "outside": lines({**offsets, 2: 10**9}),
        "far outside": lines({**offsets, 2: 2**63 - 8}),
        "too large a number": lines({**offsets, 2: 2**70}),
        "a record too few, last": lines({k: o for k, o in offsets.items() if k != last}),
        "a record too few, first": lines({k: o for k, o in offsets.items() if k}),
        "a record too few, inside": lines({k: o for k, o in offsets.items() if k != 3}),
        "half the records": lines({k: o for k, o in offsets.items() if k < last / 2}),
        "of another file": lines(other_offsets),
        "keys exchanged": lines({**offsets, 2: offsets[5], 5: offsets[2]}),
    }
    for text in damaged.values():
        (tmp_path / "train.idx").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"train\.(idx|rec): "):
            open_all(tmp_path)
    (tmp_path / "train.idx").write_text(lines(offsets).strip().replace("\t", "  "))
    assert open_all(tmp_path) == expected


def test_offsets_and_keys_that_cannot_be_are_refused_on_opening(tmp_path):
    """Those of images too, whose records an InsightFace pack does not look at until asked."""
    offsets = write(tmp_path, insightface([encoded(p) for p in pixels(6)]))
    for odd in (
        offsets[2] + 1,
        offsets[2] + 2,
        offsets[3],
        offsets[3] - 8,
        -4,
        -(2**63),
        2**63 - 4,
    ):
        (tmp_path / "train.idx").write_text(lines({**offsets, 2: odd}))
        with pytest.raises(
            ValueError, match=r"train\.idx: key \d+ at offset .*: no record can lie"
        ):
            RecordIODataset(tmp_path)
    moved = {key + 1: offset for key, offset in offsets.items()}
    (tmp_path / "train.idx").write_text(lines(moved))
    with pytest.raises(ValueError, match="keys found are 10, from 1 to 10"):
        RecordIODataset(tmp_path)


def test_keys_of_an_index_are_distinct_and_not_negative(tmp_path):
    payloads = [(k, header(0.0) + b"no image at all") for k in range(4)]  # the ids say nothing
    offsets = write(tmp_path, payloads)
    for odd, finding in ((2, "stands in it twice"), (-3, "is negative")):
        (tmp_path / "train.idx").write_text(lines({k: o for k, o in offsets.items() if k < 3}))
        with open(tmp_path / "train.idx", "a") as file:
            file.write(f"{odd}\t{offsets[3]}\n")
        with pytest.raises(ValueError, match=rf"train\.idx: key {odd} at offset \d+ {finding}"):
            RecordIODataset(tmp_path)


def test_a_record_without_image_among_images_is_refused_on_opening(tmp_path):
    payloads = im2rec([b"no image at all"] * 6)
    payloads[2] = (2, header([1.0, 2.0], 2))
    for index in ("listed", None):
        offsets = write(tmp_path / str(index), payloads, index=index)
        with pytest.raises(ValueError, match=f"offset {offsets[2]}"):
            RecordIODataset(tmp_path / str(index))


def test_more_labels_than_bytes_are_refused_on_opening(tmp_path):
    payloads = im2rec([b"no image at all"] * 6)
    payloads[2] = (2, struct.pack("<IfQQ", 9, 0, 2, 0) + struct.pack("<3f", 1, 1, 1))
    offsets = write(tmp_path, payloads)
    with pytest.raises(ValueError, match=f"2 at offset {offsets[2]}: 36 bytes, too few for 9 lab"):
        RecordIODataset(tmp_path)


WELL = struct.pack("<IfQQ", 0, 0.0, 2, 0) + bytes(range(64))  # a payload with label 0
CRAFTED = {
    "kind 3 alone": part(3, WELL),
    "kind 2 alone": part(2, WELL),
    "kind 4": part(4, WELL),
    "kind 7": part(7, WELL),
    "whole after the first part": part(1, WELL[:32]) + part(0, WELL[32:]),
    "two first parts": part(1, WELL[:32]) + part(1, WELL[32:64]) + part(3, WELL[64:]),
    "no last part": part(1, WELL[:32]) + part(2, WELL[32:]),
    "a first part with padding": part(1, WELL[:30]) + part(3, WELL[30:]),
    "a middle part with padding": part(1, WELL[:8]) + part(2, WELL[8:31]) + part(3, WELL[31:]),
    "a first part of 256 MiB": part(1, WELL[:32])[:4]
    + struct.pack("<I", 3 << 28)
    + part(1, WELL[:32])[8:]
    + part(3, WELL[32:]),
    "two records": part(0, WELL) + part(0, WELL),
    "one that takes in another": part(0, WELL + part(0, WELL)),
    "a length that is one too short": part(0, WELL[:-1] + b"x")[:4]
    + struct.pack("<I", len(WELL) - 1)
    + part(0, WELL)[8:],
    "no payload": part(1, b"") + part(2, b"") * 4 + part(3, b""),
    "less than a header": part(1, b"") * 1 + part(2, b"") * 3 + part(3, b"abc"),
    "less than its label": part(1, b"\1\0\0\0") + part(2, b"") * 3 + part(3, b"abcdefgh"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_records_that_no_writer_writes_are_refused(tmp_path, case):
    """Of images, InsightFace packs look at the first and last of an identity on opening, im2rec's
    at every header; the bytes behind it are looked at on access."""
    for dialect in ("insightface", "im2rec"):
        written = [
            (key, CRAFTED[case] if key == 2 else record(payload))
            for key, payload in DIALECTS[dialect]([encoded(p) for p in pixels(6)])
        ]
        starts = np.cumsum([0] + [len(content) for _, content in written])
        offsets = {key: start for (key, _), start in zip(written, starts[:-1], strict=True)}
        (tmp_path / "train.rec").write_bytes(b"".join(content for _, content in written))
        (tmp_path / "train.idx").write_text(lines(offsets))
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=f"key 2 at offset {offsets[2]}: (?!not a read)"):
                dataset = RecordIODataset(tmp_path)
                assert dialect == "insightface" or "too short" in case or "takes in" in case
                dataset[1 if dataset.aligned else 2]
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_every_bit_flip_of_a_magic_or_kind_is_found(tmp_path):
    for dialect in ("insightface", "im2rec"):
        offsets = write(tmp_path, DIALECTS[dialect]([encoded(p) for p in pixels(6)]))
        content = (tmp_path / "train.rec").read_bytes()
        for offset in offsets.values():
            for bit in [*range(32), 61, 62, 63]:
                flipped = bytearray(content)
                flipped[offset + bit // 8] ^= 1 << bit % 8
                (tmp_path / "train.rec").write_bytes(flipped)
                with pytest.raises(ValueError, match=f"train.rec: key .* at offset {offset}: "):
                    dataset = RecordIODataset(tmp_path)
                    assert dialect == "insightface"  # im2rec: every header is read on opening
                    items(dataset)


@pytest.mark.parametrize("dialect", list(DIALECTS)[:4])
@pytest.mark.parametrize("index", ["listed", None])
def test_truncation_at_every_offset_is_named(tmp_path, dialect, index):
    images = [encoded(p) for p in pixels(6, 2)]
    offsets = write(tmp_path, DIALECTS[dialect](images), index=index)
    rec = tmp_path / "train.rec"
    content, whole = rec.read_bytes(), open_all(tmp_path)
    for size in range(len(content)):
        rec.write_bytes(content[:size])
        try:
            found, labels = open_all(tmp_path)
        except ValueError as error:
            assert f"{tmp_path}/train." in str(error) and "offset" in str(error)
            assert "\n" not in str(error)
        else:
            # Beyond detection: whole images lost from the end, and no index or count to say so.
            assert index is None and size in offsets.values()
            assert "insightface" not in dialect or ("behind" in dialect and size <= offsets[0])
            assert labels == whole[1][: len(labels)]
            assert [item[1:] for item in found] == [item[1:] for item in whole[0]][: len(found)]


def test_count_in_property_tells_of_images_lost_from_the_end(tmp_path):
    offsets = write(tmp_path, im2rec([encoded(p) for p in pixels(6)]), "3,4,4\n6\n", index=None)
    content = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(content[: offsets[4]])
    with pytest.raises(ValueError, match="property: 6 images, but .*train.rec has 4: truncated"):
        RecordIODataset(tmp_path)


def flips(content):
    """Every single-bit flip: (byte, content)."""
    for at in range(len(content)):
        for bit in range(8):
            yield at, content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("dialect", "index"),
    [
        ("insightface, record 0 behind the images", "listed"),
        pytest.param("im2rec", None, marks=pytest.mark.slow),
        pytest.param("insightface, record 0 behind the images", None, marks=pytest.mark.slow),
        pytest.param("insightface, [label, aligned]", "listed", marks=pytest.mark.slow),
        pytest.param("im2rec", "listed", marks=pytest.mark.slow),
    ],
)
def test_every_bit_flip_outside_images_is_an_error_or_changes_nothing(tmp_path, dialect, index):
    """Beyond detection, as nothing repeats them: image bytes, and im2rec's float32 label."""
    image = encoded(pixels(1, 1)[0])
    payloads = DIALECTS[dialect]([image] * 6)
    write(tmp_path, payloads, index=index)
    rec = tmp_path / "train.rec"
    content, whole = rec.read_bytes(), open_all(tmp_path)
    beyond, labels_at, at = set(), set(), content.find(image)
    while at >= 0:
        beyond |= set(range(at, at + len(image)))
        labels_at |= set(range(at - 20, at - 16))  # where there is one label: before id and id2
        at = content.find(image, at + 1)
    harmless = 0
    for at, flipped in flips(content):
        if at in beyond:
            continue
        rec.write_bytes(flipped)
        try:
            found = open_all(tmp_path)
        except ValueError as error:
            assert f"{tmp_path}/train." in str(error) and "\n" not in str(error)
            assert "offset" in str(error) or "identities" in str(error)
        else:
            if dialect == "im2rec" and at in labels_at:
                assert [item[:2] for item in found[0]] == [item[:2] for item in whole[0]]
            else:
                assert found == whole
                harmless += 1
    assert harmless  # id2 at the least


@pytest.mark.parametrize("dialect", ["insightface", "im2rec"])
def test_every_bit_flip_of_the_index_is_an_error_or_changes_nothing(tmp_path, dialect):
    write(tmp_path, DIALECTS[dialect]([encoded(p) for p in pixels(6)]))
    whole = open_all(tmp_path)
    index = tmp_path / "train.idx"
    for _, flipped in flips(index.read_bytes()):
        index.write_bytes(flipped)
        try:
            assert open_all(tmp_path) == whole
        except ValueError as error:
            assert f"{tmp_path}/train." in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("at", [4, 8])  # the length of the part; the number of labels
@pytest.mark.parametrize("value", [2**28, 2**29 - 1, 3 * 2**28, 2**31 + 5, 2**32 - 1])
@pytest.mark.parametrize("dialect", ["insightface", "im2rec"])
@pytest.mark.parametrize("key", [0, 1, 2, 5])
def test_absurd_lengths_allocate_nothing(tmp_path, at, value, dialect, key):
    offsets = write(tmp_path, DIALECTS[dialect]([encoded(p) for p in pixels(6)]))
    content = bytearray((tmp_path / "train.rec").read_bytes())
    struct.pack_into("<I", content, offsets[key] + at, value)
    (tmp_path / "train.rec").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"train\.rec: key \d+ at offset \d+: "):
            open_all(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_an_index_that_leaves_out_most_records_does_not_read_their_bytes(tmp_path):
    payloads = im2rec([bytes(2**20)] * 6)
    write(tmp_path, payloads)
    (tmp_path / "train.idx").write_text("0\t0\n")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="key 0 at offset 0: .* next record .* is at 6291"):
            RecordIODataset(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_happens_to_the_file_after_opening_is_an_error_too(tmp_path):
    offsets = write(tmp_path, insightface([encoded(p) for p in pixels(6)]))
    dataset = RecordIODataset(tmp_path)
    content = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(content[: offsets[4] + 20])
    assert dataset[2][1] == 0
    with pytest.raises(ValueError, match=f"at offset {offsets[4]}: the file ends at .* truncated"):
        dataset[3]


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4, b"\0" * 400, MAGIC * 100, b"PK\3\4" * 100, MAGIC + b"\0" * 36]
)
@pytest.mark.parametrize("index", ["", "0\t0\n", None])
def test_files_that_are_no_recordio_are_refused(tmp_path, content, index):
    (tmp_path / "train.rec").write_bytes(content)
    if index is not None:
        (tmp_path / "train.idx").write_text(index)
    with pytest.raises(ValueError, match=r"train\.(rec|idx): .*"):
        RecordIODataset(tmp_path)


# -- large and many ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pack_of_the_size_of_ms1mv3(tmp_path):
    """5,179,510 images of 93,431 identities: the labels, and no image decoded (none is one)."""
    images, identities = 5_179_510, 93_431
    cuts = np.random.default_rng(0).choice(np.arange(1, images), identities - 1, replace=False)
    begins = np.concatenate([[1], np.sort(cuts) + 1])
    ends = np.append(begins[1:], images + 1)
    truth = np.repeat(np.arange(identities), ends - begins)
    kind = np.dtype(
        [(f, "<u4") for f in ("magic", "lrec", "flag")]
        + [("label", "<f4"), ("id", "<u8"), ("id2", "<u8"), ("x", "<f4"), ("y", "<f4")]
    )
    rows = np.zeros(1 + images + identities, kind)
    rows["magic"], rows["lrec"], rows["id"] = 0xCED7230A, 32, np.arange(len(rows))
    rows["label"][1 : images + 1] = truth
    rows["flag"][0] = 2
    rows["flag"][images + 1 :] = 2
    rows["x"][0], rows["y"][0] = images + 1, images + 1 + identities
    rows["x"][images + 1 :], rows["y"][images + 1 :] = begins, ends
    rows.tofile(tmp_path / "train.rec")
    (tmp_path / "property").write_text(f"{identities},112,112")
    with open(tmp_path / "train.idx", "w") as file:
        file.writelines(f"{key}\t{key * 40}\n" for key in range(len(rows)))
    dataset = RecordIODataset(tmp_path)
    assert (len(dataset), dataset.classes) == (images, identities)
    assert np.array_equal(dataset.labels, truth)
    (tmp_path / "train.idx").unlink()
    assert np.array_equal(RecordIODataset(tmp_path).labels, truth)
    (tmp_path / "train.rec").unlink()


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """(folder, contents of its files, items) of each dialect, with one split record in each."""
    made = []
    images = [encoded(p) for p in pixels(5)] + [bitmap([b"abcd", MAGIC, b"efgh"])]
    for number, dialect in enumerate(list(DIALECTS)[:6]):
        folder = tmp_path_factory.mktemp("pack") / str(number)
        write(folder, DIALECTS[dialect](images), property_="3,4,4\n6\n")
        contents = {p.name: p.read_bytes() for p in folder.iterdir()}
        rec = contents["train.rec"]
        protected = np.zeros(len(rec), bool)
        for image in [*images[:5], images[5][:60], images[5][64:]]:
            at = rec.find(image)
            while at >= 0:
                protected[at : at + len(image)] = True
                if dialect.startswith("im2rec"):  # and the header: nothing repeats its label
                    protected[at - (36 if "several" in dialect else 24) : at] = True
                at = rec.find(image, at + 1)
        made.append((folder, contents, np.flatnonzero(~protected), items(RecordIODataset(folder))))
    return made


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=4_000)
@given(st.data())
def test_thousands_of_damaged_packs_give_errors_and_never_another_item(packs, data):
    folder, contents, free, whole = packs[data.draw(st.integers(0, len(packs) - 1))]
    random_ = data.draw(st.randoms(use_true_random=False))
    damaged = {name: bytearray(content) for name, content in contents.items()}
    name = data.draw(st.sampled_from(["train.rec", "train.rec", "train.idx", "property"]))
    content = damaged[name]
    strict = name != "property"
    for _ in range(data.draw(st.integers(1, 4))):
        how = data.draw(st.sampled_from(["set", "word", "cut", "insert", "delete", "repeat"]))
        at = random_.randrange(len(content)) if content else 0
        if how == "set" and content:
            at = int(random_.choice(free)) if name == "train.rec" else at
            at = min(at, len(content) - 1)
            content[at] = random_.randrange(256)
        elif how == "word":
            value = random_.choice([0, 1, 2, 2**24, 2**29, 2**31, 2**32 - 1, 0xCED7230A])
            content[at // 4 * 4 : at // 4 * 4 + 4] = struct.pack("<I", value)
            strict = strict and name != "train.rec"
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = random_.randbytes(random_.choice([1, 4, 40]))
            strict = strict and name != "train.rec"
        elif how == "delete":
            del content[at : at + random_.choice([1, 4, 40, 120])]
            strict = strict and name != "train.rec"
        else:
            content[at:at] = content[max(0, at - 40) : at]
            strict = strict and name != "train.rec"
    if data.draw(st.booleans()) and name != "train.idx":
        del damaged["train.idx"]
    for known in contents:
        if known in damaged:
            (folder / known).write_bytes(damaged[known])
        else:
            (folder / known).unlink(missing_ok=True)
    tracemalloc.start()
    try:
        dataset = RecordIODataset(folder)
        for i in range(len(dataset)):
            try:
                image, label = dataset[i]
            except ValueError as error:
                assert str(folder) in str(error) and "\n" not in str(error)
            else:
                assert image.dtype == torch.uint8 and 0 <= label < dataset.classes
                if strict and "train.idx" in damaged:
                    assert (dataset.name(i), image.numpy().tobytes(), label) in whole
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**24
