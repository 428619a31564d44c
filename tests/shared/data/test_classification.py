"""Readers on files in the true formats, written here byte by byte."""

from __future__ import annotations

import pickle
import struct
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from crrcd.config import RECIPES, Config
from crrcd.train import train
from shared.config import Data, Network, Optim, Teacher
from shared.data import classification
from shared.data.items import decode, fit
from shared.data.pipeline import Streaming
from shared.data.sets import load

TINY = Optim(lr=0.05, batch=20, epochs=1, clip=1.0)


def objects(data: Data, tmp: Path) -> Config:
    return Config(
        recipe="test", data=data, optim=TINY, n=16, queue=64, baselines=("alone",), threads=1,
        teacher=Teacher(name="resnet8", head="softmax", optim=TINY), precision="fp32",
        student=Network(name="resnet8", head="softmax"), runs=str(tmp / "runs"),
        cache=str(tmp / "cache"), report=False,
    )  # fmt: skip


# -- CIFAR-100, python version -------------------------------------------------------------------


def cifar100(root: Path, train_count: int = 60, test_count: int = 40) -> dict[str, np.ndarray]:
    """cifar-100-python/{train,test,meta}: pickled dicts, rows of 3,072 bytes, planes
    R, G, B. torchvision checks the md5 of the published files, so the check is told of ours."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = {}
    for name, count in (("train", train_count), ("test", test_count)):
        rows = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        fine = [k % 100 for k in range(count)]
        record = {
            "filenames": ["x.png"] * count,
            "batch_label": "batch 1 of 1",
            "fine_labels": fine,
            "coarse_labels": [k % 20 for k in fine],
            "data": rows,
        }
        (folder / name).write_bytes(pickle.dumps(record, protocol=2))
        written[name] = rows
    meta = {"fine_label_names": [f"c{k}" for k in range(100)],
            "coarse_label_names": [f"s{k}" for k in range(20)]}  # fmt: skip
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    return written


@pytest.fixture
def any_md5(monkeypatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: (
        Path(path).is_file()))  # fmt: skip


def test_cifar100_python_folder_is_read_pixel_for_pixel(tmp_path: Path, any_md5) -> None:
    written = cifar100(tmp_path)
    data = replace(RECIPES["table1"].data, root=str(tmp_path))
    parts = classification.read(data, tmp_path)
    assert parts.classes == 100
    for images, name in ((parts.train, "train"), (parts.held_out["test"], "test")):
        for k in (0, 7, 39):
            expected = written[name][k].reshape(3, 32, 32)
            assert np.array_equal(images.pixels[k].numpy(), expected)
            assert images.labels[k] == k % 100


def test_the_same_script_trains_on_a_cifar100_folder(tmp_path: Path, any_md5) -> None:
    cifar100(tmp_path, 200)
    data = replace(RECIPES["table1"].data, root=str(tmp_path), lr=16)
    run = train(objects(data, tmp_path))
    assert (run / "results.json").is_file()


@pytest.mark.parametrize("damage", ["missing file", "truncated"])
def test_a_damaged_cifar_folder_is_one_clear_line(tmp_path: Path, any_md5, damage: str) -> None:
    cifar100(tmp_path)
    path = tmp_path / "cifar-100-python" / "test"
    path.unlink() if damage == "missing file" else path.write_bytes(path.read_bytes()[:900])
    data = replace(RECIPES["table1"].data, root=str(tmp_path))
    with pytest.raises(ValueError, match="cifar100 in .*cifar-100-python/"):
        classification.read(data, tmp_path)


# -- SVHN ----------------------------------------------------------------------------------------


def test_svhn_mat_files_are_read_with_10_as_the_digit_0(tmp_path: Path, monkeypatch) -> None:
    """{train,test}_32x32.mat: X [32, 32, 3, N] uint8, y [N, 1] with 1..10."""
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda path, md5=None: True)
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (32, 32, 3, 30), dtype=np.uint8)
    y = (np.arange(30) % 10 + 1)[:, None].astype(np.uint8)
    for name in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{name}_32x32.mat", {"X": x, "y": y})
    data = replace(RECIPES["table3"].data, root=str(tmp_path))
    parts = classification.read(data, tmp_path)
    assert np.array_equal(parts.train.pixels[4].numpy(), x[:, :, :, 4].transpose(2, 0, 1))
    assert parts.train.labels[9] == 0 and parts.train.labels[0] == 1


# -- STL-10, binaries ----------------------------------------------------------------------------


def stl10(root: Path, train_count: int = 2, test_count: int = 3) -> dict[str, np.ndarray]:
    """stl10_binary/{train,test}_{X,y}.bin, byte by byte: planes R, G, B, each column after
    column; labels from 1. Returns the images [N, 3, 96, 96], rows before columns."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = {}
    for name, count in (("train", train_count), ("test", test_count)):
        images = np.stack([smooth(rng, 96) for _ in range(count)])
        content = bytearray()
        for image in images.tolist():
            for plane in image:
                for column in range(96):
                    for row in range(96):
                        content.append(plane[row][column])
        (folder / f"{name}_X.bin").write_bytes(content)
        (folder / f"{name}_y.bin").write_bytes(bytes(10 - k % 10 for k in range(count)))
        written[name] = images
    return written


def smooth(rng: np.random.Generator, side: int) -> np.ndarray:
    """[3, side, side] uint8 that no transposition or change of planes leaves as it is."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(rng.uniform(3, 9) * x + rng.uniform(9, 15) * y) for _ in range(3)]
    return (127 + 120 * np.stack(waves)).astype(np.uint8)


def stl10_data(root: Path, **changes) -> Data:
    return replace(Data(name="stl10", root=str(root), hr=96, lr=32, counts="any"), **changes)


def test_stl10_binaries_are_read_pixel_for_pixel(tmp_path: Path) -> None:
    written = stl10(tmp_path)
    for root in (tmp_path, tmp_path / "stl10_binary"):
        parts = classification.read(stl10_data(root), tmp_path)
        assert parts.classes == 10 and parts.fingerprint
        for images, name in ((parts.train, "train"), (parts.held_out["test"], "test")):
            assert np.array_equal(images.pixels.numpy(), written[name])
            assert images.labels.tolist() == [9 - k for k in range(len(images))]


def interpolated(image: np.ndarray, side: int) -> np.ndarray:
    """PyTorch's antialiased bicubic, whose kernel is the one of Pillow (a = -0.5)."""
    x = torch.from_numpy(image)[None].float()
    x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return x[0].round().clamp(0, 255).numpy()


def test_stl10_at_32_px_is_antialiased_bicubic(tmp_path: Path) -> None:
    written = stl10(tmp_path)
    parts = classification.read(stl10_data(tmp_path, hr=32), tmp_path)
    assert parts.train.pixels.shape == (2, 3, 32, 32)
    for found, image in zip(parts.held_out["test"].pixels, written["test"], strict=True):
        assert np.abs(found.numpy() - interpolated(image, 32)).max() <= 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "train_y.bin: no such file"),
        ("short", "train_X.bin: 55,295 bytes are not the 2 images of 3 x 96 x 96 bytes"),
        ("an image short", "train_X.bin: 27,648 bytes are not the 2 images"),
        ("empty", "train_X.bin: 0 bytes are not the 0 images"),
        ("label 0", "train_y.bin: label 1 is 0, not 1 to 10"),
        ("label 11", "train_y.bin: label 1 is 11, not 1 to 10"),
    ],
)
def test_a_damaged_stl10_is_one_clear_line(tmp_path: Path, damage: str, words: str) -> None:
    stl10(tmp_path)
    pixels, labels = (tmp_path / "stl10_binary" / f"train_{kind}.bin" for kind in "Xy")
    content = pixels.read_bytes()
    if damage == "missing":
        labels.unlink()
    elif "label" in damage:
        labels.write_bytes(bytes([3, int(damage.split()[1])]))
    else:
        pixels.write_bytes({"short": content[:-1], "empty": b""}.get(damage, content[:27648]))
        labels.write_bytes(b"" if damage == "empty" else labels.read_bytes())
    with pytest.raises(ValueError, match=words):
        classification.read(stl10_data(tmp_path), tmp_path)


def test_stl10_must_be_complete_unless_asked_otherwise(tmp_path: Path) -> None:
    assert classification.STL10 == {"training images": 5000, "test images": 8000}
    stl10(tmp_path)
    with pytest.raises(ValueError, match="2 training images instead of 5,000, 3 test images inste"):
        classification.read(stl10_data(tmp_path, counts="published"), tmp_path)


def test_stl10_is_downloaded_once_and_a_failure_says_what_to_do(
    tmp_path: Path, monkeypatch
) -> None:
    def offline(root: str, download: bool) -> None:
        assert download and root == str(tmp_path / "stl10")
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.STL10", offline)
    with pytest.raises(ValueError, match="download failed; fetch it elsewhere .*--data.root"):
        classification.read(replace(stl10_data(tmp_path), root=""), tmp_path)
    stl10(tmp_path / "stl10")
    assert len(classification.read(replace(stl10_data(tmp_path), root=""), tmp_path).train) == 2


# -- Tiny ImageNet -------------------------------------------------------------------------------

WNIDS = ["n02124075", "n01443537", "n04067472"]  # as in wnids.txt: not sorted
HELD = ["n04067472", "n01443537", "n01443537", "n02124075"]  # of val_0.JPEG, val_1.JPEG ...


def tiny_imagenet(root: Path, newline: str = "\n") -> Path:
    home = root / "tiny-imagenet-200"
    rng = np.random.default_rng(0)
    for wnid in WNIDS:
        (home / "train" / wnid / "images").mkdir(parents=True)
        lines = []
        for k in range(3):
            name = f"{wnid}_{k}.JPEG"
            image = Image.fromarray(smooth(rng, 64).transpose(1, 2, 0))
            image = image.convert("L") if k == 2 else image
            image.save(home / "train" / wnid / "images" / name, quality=95)
            lines.append(f"{name}\t0\t10\t63\t58")
        boxes = home / "train" / wnid / f"{wnid}_boxes.txt"
        boxes.write_bytes("".join(line + newline for line in lines).encode())
    (home / "val" / "images").mkdir(parents=True)
    lines = []
    for k, wnid in enumerate(HELD):
        Image.new("RGB", (64, 64), (60 * k, 0, 255)).save(home / "val" / "images" / f"val_{k}.JPEG")
        lines.append(f"val_{k}.JPEG\t{wnid}\t0\t32\t44\t62")
    (home / "val" / "val_annotations.txt").write_bytes(
        "".join(line + newline for line in lines).encode()
    )
    (home / "wnids.txt").write_bytes(newline.join(WNIDS).encode())
    (home / "test" / "images").mkdir(parents=True)
    return home


def tiny_data(root: Path, **changes) -> Data:
    base = Data(name="tinyimagenet", root=str(root), hr=64, lr=32, counts="any", workers=0)
    return replace(base, **changes)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_tiny_imagenet_is_read_with_classes_in_sorted_order(tmp_path: Path, newline: str) -> None:
    home = tiny_imagenet(tmp_path, newline)
    order = sorted(WNIDS)
    for root in (home, tmp_path):
        parts = classification.read(tiny_data(root), tmp_path)
        train, test = parts.train, parts.held_out["test"]
        assert parts.classes == 3 and train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert test.labels.tolist() == [order.index(wnid) for wnid in HELD]
        for number, wnid in enumerate(order):
            for k in range(3):
                with Image.open(home / "train" / wnid / "images" / f"{wnid}_{k}.JPEG") as image:
                    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
                assert np.array_equal(train.pixels[3 * number + k].numpy(), expected)
        assert [int(image[0, 9, 9]) // 58 for image in test.pixels] == [0, 1, 2, 3]


def test_tiny_imagenet_at_32_px_is_antialiased_bicubic(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    native = classification.read(tiny_data(tmp_path), tmp_path).train.pixels.numpy()
    small = classification.read(tiny_data(tmp_path, hr=32), tmp_path).train.pixels.numpy()
    assert small.shape == (9, 3, 32, 32)
    for found, image in zip(small, native, strict=True):
        assert np.abs(found - interpolated(image, 32)).max() <= 1


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("val/val_annotations.txt", b"val_2.JPEG\tn01443537", b"val_2.JPEG\tn0144353",
         "val_annotations.txt, line 3: expected <file> <wnid of wnids.txt>"),
        ("val/val_annotations.txt", b"val_2.JPEG\t", b"val_2.JPEG", "annotations.txt, line 3: ex"),
        ("val/val_annotations.txt", b"val_2.JPEG", b"v\xe4l_2.JPEG", "annotations.txt, line 3: e"),
        ("val/val_annotations.txt", b"val_2.JPEG", b"val_9.JPEG",
         "1 of the 4 images it names are not there, the first: 'val_9.JPEG'"),
        ("val/val_annotations.txt", b"val_2.JPEG", b"val_1.JPEG", "names val_1.JPEG twice"),
        ("wnids.txt", b"n04067472", b"n04067473", "train/ and wnids.txt differ in 2 wnids, as n04"),
        ("wnids.txt", b"n04067472", b"n04067472 x", "wnids.txt, line 3: expected <wnid>"),
    ],
)  # fmt: skip
def test_a_damaged_list_of_tiny_imagenet_is_named(
    tmp_path: Path, file: str, old: bytes, new: bytes, words: str
) -> None:
    path = tiny_imagenet(tmp_path) / file
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match=words) as error:
        classification.read(tiny_data(tmp_path), tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("wnids.txt", "no Tiny ImageNet in it or in a folder of it: no wnids.txt"),
        ("train", r"no train/ folder in it"),
        ("train/n01443537/images", "n01443537: no image in it"),
        ("train/n01443537", "differ in 1 wnids, as n01443537"),
        ("val/val_annotations.txt", "val_annotations.txt: cannot be read"),
        ("val/images", "4 of the 4 images it names are not there"),
    ],
)
def test_what_is_missing_of_tiny_imagenet_is_named(tmp_path: Path, gone: str, words: str) -> None:
    (tiny_imagenet(tmp_path) / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=words):
        classification.read(tiny_data(tmp_path), tmp_path)


def test_tiny_imagenet_must_be_complete_unless_asked_otherwise(tmp_path: Path) -> None:
    published = {"classes": 200, "training images": 100_000, "test images": 10_000}
    assert published == classification.TINY_IMAGENET
    tiny_imagenet(tmp_path)
    with pytest.raises(ValueError, match="3 classes instead of 200, 9 training images instead of"):
        classification.read(tiny_data(tmp_path, counts="published"), tmp_path)
    with pytest.raises(ValueError, match="--data.name tinyimagenet needs --data.root"):
        classification.read(replace(tiny_data(tmp_path), root=""), tmp_path)


def test_corrupt_images_of_tiny_imagenet_are_left_out_of_both_parts(tmp_path: Path) -> None:
    home = tiny_imagenet(tmp_path)
    bad = [home / "train" / WNIDS[1] / "images" / f"{WNIDS[1]}_0.JPEG",
           home / "val" / "images" / "val_0.JPEG"]  # fmt: skip
    for path in bad:
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ValueError, match="JPEG: not a readable image.*--data.on-error skip"):
            classification.read(tiny_data(tmp_path), tmp_path)
    for gib in (4.0, 0.0):
        data = tiny_data(tmp_path, on_error="skip", resident_gib=gib)
        parts = classification.read(data, tmp_path)
        test = parts.held_out["test"]
        assert len(test) == 3 and test.labels.tolist() == [0, 0, 1]
        named = [message.split(": not a readable")[0] for message in parts.skipped]
        assert str(bad[1]) in named
        if gib:
            assert named == list(map(str, bad)) and len(parts.train) == 8
    for path in (home / "val" / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of 4 images can be decoded; .*val_0.JPEG"):
        classification.read(data, tmp_path)


# -- digits --------------------------------------------------------------------------------------


def test_digits_are_split_without_overlap_and_at_full_range() -> None:
    data = RECIPES["digits"].data
    parts = classification.read(data, Path())
    held = [parts.train, parts.held_out["development"], parts.held_out["test"]]
    assert [len(p) for p in held] == [1000, 297, 500]
    assert int(parts.train.pixels.max()) == 255 and parts.train.pixels.shape[1:] == (3, 8, 8)
    assert sum(p.pixels[:, 0].sum(dtype=torch.int64) for p in held) == sum(
        np.rint(v * 255 / 16).astype(int)
        for v in load_digits().images.flatten()
    )


# -- folders -------------------------------------------------------------------------------------


def tree(root: Path, parts: dict[str, dict[str, int]]) -> Path:
    rng = np.random.default_rng(0)
    for part, classes in parts.items():
        for name, count in classes.items():
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (20 + k % 5, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{k}.png")
    return root


def image_data(root: Path, **changes) -> Data:
    base = Data(name="folder", root=str(root), hr=16, lr=8, shift=2, shift_step=1)
    return replace(base, **changes)


def test_the_same_script_trains_on_a_folder_of_images(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", {"train": {"ant": 30, "bee": 30}, "test": {"ant": 9, "bee": 8}})
    run = train(objects(image_data(root), tmp_path))
    assert (run / "results.json").is_file()


def test_a_folder_with_other_people_is_scored_as_faces(tmp_path: Path) -> None:
    train_part = {f"p{k}": 4 for k in range(10)}
    test_part = {f"q{k}": 8 for k in range(40)}
    root = tree(tmp_path / "set", {"train": train_part, "test": test_part})
    found = load(image_data(root), cache=tmp_path)
    assert found.task == "faces" and found.evaluations["test"].pairs is not None
    with pytest.raises(ValueError, match="too few images"):
        load(image_data(tree(tmp_path / "small", {"train": train_part, "test": {"z": 3}})),
             cache=tmp_path)  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"test": {"a": 1}}, "no train/ folder"),
        ({"train": {"a": 1, "b": 1}}, "no test/ or val/ folder"),
        ({"train": {"a": 1}, "test": {"a": 1}}, "1 class; training needs 2"),
        ({"train": {"a": 1, "b": 0}, "test": {"a": 1}}, "b: no image in it"),
        ({"train": {"a": 1, "b": 1}, "test": {"a": 1, "c": 1}}, "train/ does not have: c"),
        (
            {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}, "val": {"c": 1}},
            "test/ and val/ must both hold train/'s classes, or neither",
        ),
    ],
)
def test_a_folder_that_cannot_serve_says_why(tmp_path: Path, parts: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classification.read(image_data(tree(tmp_path, parts)), tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "huge header", "bomb"])
def test_a_corrupt_image_is_named_or_counted(tmp_path: Path, damage: str) -> None:
    root = tree(tmp_path, {"train": {"a": 3, "b": 3}, "test": {"a": 2, "b": 2}})
    bad = root / "train" / "b" / "1.png"
    content = {
        "truncated": bad.read_bytes()[:200],
        "empty": b"",
        "text": b"<html>404</html>",
        "bomb": bad.read_bytes()[:16] + struct.pack(">II", 40_000, 40_000) + bad.read_bytes()[24:],
        "huge header": bad.read_bytes()[:16] + b"\x7f\xff\xff\xff\x7f\xff\xff\xff",
    }[damage]
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=r"b/1\.png: not a readable image") as error:
        classification.read(image_data(root), tmp_path)
    assert "--data.on-error skip" in str(error.value) and "\n" not in str(error.value)
    parts = classification.read(image_data(root, on_error="skip"), tmp_path)
    assert len(parts.train) == 5 and len(parts.skipped) == 1
    assert parts.skipped[0].startswith(f"{bad}: not a readable image")
    assert parts.train.labels.tolist() == [0, 0, 0, 1, 1]


def test_images_that_do_not_fit_in_memory_are_streamed_equally(tmp_path: Path) -> None:
    root = tree(tmp_path, {"train": {"a": 5, "b": 5}, "test": {"a": 2, "b": 2}})
    resident = classification.read(image_data(root), tmp_path).train
    streamed = classification.read(image_data(root, resident_gib=0.0), tmp_path).train
    assert isinstance(streamed, Streaming)
    order = torch.arange(10).split(4)
    for (_, a), (_, b) in zip(resident.batches(order), streamed.batches(order), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.full((16, 16), 200, np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else (
        Image.fromarray(grey).convert(mode))  # fmt: skip
    image.save(tmp_path / "x.png")
    found = fit(decode(tmp_path / "x.png"), 16)
    assert found.shape == (3, 16, 16) and found.dtype == torch.uint8
    if mode != "I;16":  # PIL clips 16 bits instead of scaling them
        assert (found == 200).all()


def test_a_centre_crop_of_the_resized_image(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255  # the middle third
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert fit(decode(tmp_path / "x.png"), 20).float().mean() == 255
