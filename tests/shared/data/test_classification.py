"""Readers on files in the true formats, written here byte by byte."""

from __future__ import annotations

import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from sklearn.datasets import load_digits

from crrcd.config import RECIPES, Config
from crrcd.train import train
from shared.config import Data, Network, Optim, Teacher
from shared.data import classification
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
    assert len(parts.train) == 5 and parts.skipped == (str(bad),)
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
    found = classification.decode_image(tmp_path / "x.png", 16)
    assert found.shape == (3, 16, 16) and found.dtype == torch.uint8
    if mode != "I;16":  # PIL clips 16 bits instead of scaling them
        assert (found == 200).all()


def test_a_centre_crop_of_the_resized_image(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255  # the middle third
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert classification.decode_image(tmp_path / "x.png", 20).float().mean() == 255
