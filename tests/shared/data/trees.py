"""Small data sets in the published formats, written without any reader's help."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from shared.data import procedural

SIZE = 32
FACES = procedural.Faces(size=SIZE)


def people(count: int, each: int, first: int = 0) -> np.ndarray:
    """uint8 [count, each, SIZE, SIZE, 3]: procedural people, so that a network can tell them."""
    who = np.repeat(np.arange(first, first + count), each)
    drawn = procedural.render(FACES, who, np.tile(np.arange(each), count))
    return drawn.transpose(0, 2, 3, 1).reshape(count, each, SIZE, SIZE, 3)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_pack(folder: Path, faces: np.ndarray) -> None:
    """InsightFace's RecordIO: header record 0, images 1..N, then an entry for each identity."""
    folder.mkdir(parents=True, exist_ok=True)
    people, each = faces.shape[:2]
    count = people * each
    payloads = [struct.pack("<IfQQ2f", 2, 0, 0, 0, count + 1, count + 1 + people)]
    for i in range(count):
        image = encoded(faces[i // each, i % each])
        payloads.append(struct.pack("<IfQQ", 0, i // each, i + 1, 0) + image)
    for k in range(people):
        span = (1 + k * each, 1 + (k + 1) * each)
        payloads.append(struct.pack("<IfQQ2f", 2, 0, count + 1 + k, 0, *span))
    at, index, body = 0, "", b""
    for key, payload in enumerate(payloads):
        assert struct.pack("<I", 0xCED7230A) not in payload  # or it would have to be split
        index += f"{key}\t{at}\n"
        record = struct.pack("<II", 0xCED7230A, len(payload)) + payload
        record += b"\0" * (-len(record) % 4)
        at, body = at + len(record), body + record
    (folder / "train.rec").write_bytes(body)
    (folder / "train.idx").write_text(index)
    (folder / "property").write_text(f"{people},{SIZE},{SIZE}\n")


def pairs_of(faces: np.ndarray, folds: int = 10, half: int = 2) -> list[tuple[int, ...]]:
    """(person, image, person, image) fold after fold: `half` pairs of one person, `half` of two."""
    people, found = len(faces), []
    for k in range(folds):
        for h in range(half):
            found.append(((k + h) % people, 0, (k + h) % people, 1))
        for h in range(half):
            found.append(((k + h) % people, 0, (k + h + 1) % people, 1))
    return found


def write_bin(path: Path, faces: np.ndarray, half: int = 2) -> None:
    pairs = pairs_of(faces, half=half)
    images = [encoded(faces[p, i]) for a, i, b, j in pairs for p, i in ((a, i), (b, j))]
    path.write_bytes(pickle.dumps((images, [a == b for a, _, b, _ in pairs]), protocol=2))


def write_lfw(root: Path, faces: np.ndarray) -> None:
    for p, own in enumerate(faces):
        for i, image in enumerate(own):
            put(root / f"Person_{p}" / f"Person_{p}_{i + 1:04d}.png", image)
    lines = ["10\t2"]
    for a, i, b, j in pairs_of(faces):
        one = f"Person_{a}\t{i + 1}\t{j + 1}"
        lines.append(one if a == b else f"Person_{a}\t{i + 1}\tPerson_{b}\t{j + 1}")
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")


def write_folders(root: Path, faces: np.ndarray) -> None:
    """ROOT/<person>/<image>, as CASIA-WebFace, UCCS and TinyFace's training set lie."""
    for p, own in enumerate(faces):
        for i, image in enumerate(own):
            put(root / f"{p:07d}" / f"{i + 1:03d}.png", image)


def write_umdfaces(root: Path, faces: np.ndarray) -> list[str]:
    """Two batches, each with its list, whose SUBJECT_IDs begin anew; returns the paths of all."""
    names = []
    for batch, people in enumerate(np.array_split(faces, 2), 1):
        home = root / f"umdfaces_batch{batch}"
        lines = ["SUBJECT_ID,FILE,FACE_ID,UF,FACE_X,FACE_Y,FACE_WIDTH,FACE_HEIGHT,YAW"]
        for p, own in enumerate(people, 1):
            for i, image in enumerate(own, 1):
                file = f"person_{batch}_{p}/person_{batch}_{p}_{i:04d}.png"
                put(home / file, image)
                lines.append(f"{p},{file},{len(lines)},0,3.5,3,26,25.5,0")
                names.append(f"{home.name}/{file}")
        (home / f"{home.name}_ultraface.csv").write_text("\n".join(lines) + "\n")
    return names


def write_svhn(root: Path, each: int) -> None:
    """{train,test}_32x32.mat: X [32, 32, 3, N] uint8, y [N, 1] from 1 to 10, which is the 0."""
    digits = np.arange(10 * each) % 10 + 1
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10 * each), dtype=np.uint8)
    for name in ("train", "test"):
        y = digits[:, None].astype(np.uint8)
        scipy.io.savemat(root / f"{name}_32x32.mat", {"X": noise, "y": y})


def _cells(names: list[str]) -> np.ndarray:
    cells = np.empty((len(names), 1), dtype=object)
    cells[:, 0] = names
    return cells


def write_tinyface(root: Path, faces: np.ndarray, distractors: np.ndarray) -> None:
    test = root / "Testing_Set"
    for folder, which, image in (("Gallery_Match", "gallery", 0), ("Probe", "probe", 1)):
        names = []
        for p, own in enumerate(faces):
            names.append(f"{p + 1}_{image}.png")
            put(test / folder / names[-1], own[image])
        path = test / (
            "gallery_match_img_ID_pairs.mat" if which == "gallery" else "probe_img_ID_pairs.mat"
        )
        ids = np.arange(1, len(faces) + 1, dtype=np.uint16)[:, None]
        scipy.io.savemat(path, {f"{which}_set": _cells(names), f"{which}_ids": ids})
    for k, image in enumerate(distractors):
        put(test / "Gallery_Distractor" / f"d_{k}.png", image)


def write_survface(root: Path, faces: np.ndarray, unmated: np.ndarray) -> None:
    test = root / "Face_Identification_Test_Set"
    for folder, which, images in (("gallery", "gallery", (0, 1)), ("mated_probe",) * 2 + ((2,),)):
        names, ids = [], []
        for p, own in enumerate(faces):
            for i in images:
                names.append(f"{p + 1}_cam1_{i}.png")
                ids.append(p + 1)
                put(test / folder / names[-1], own[i])
        column = np.array(ids, dtype=np.float64)[:, None]
        path = test / f"{folder}_img_ID_pairs.mat"
        scipy.io.savemat(path, {f"{which}_set": _cells(names), f"{which}_ids": column})
    for k, image in enumerate(unmated):
        put(test / "unmated_probe" / f"u_{k}.png", image)


def write_cub(
    root: Path,
    photographs: np.ndarray,
    classes: Iterable[int] = range(1, 201),
    box: tuple[float, ...] = (1.0, 2.0, 20.0, 20.0),
) -> None:
    """photographs [C, n, H, W, 3] of classes 1 to 200, of which the first hundred train; box: x, y,
    width, height of all."""
    lists: dict[str, list[str]] = {"images": [], "image_class_labels": [], "bounding_boxes": []}
    number = 0
    for c, own in zip(classes, photographs, strict=True):
        for i, image in enumerate(own):
            number += 1
            name = f"{c:03d}.Bird_{c}/Bird_{c}_{i:04d}.png"
            put(root / "images" / name, image)
            lists["images"].append(f"{number} {name}")
            lists["image_class_labels"].append(f"{number} {c}")
            lists["bounding_boxes"].append(" ".join(map(str, (number, *box))))
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")


def write_cars(
    root: Path,
    photographs: np.ndarray,
    classes: Iterable[int] = range(1, 197),
    box: tuple[int, ...] = (2, 3, 20, 21),
) -> None:
    """photographs [C, n, H, W, 3] of classes 1 to 196, of which 98 train; the CSV re-release; box:
    x1, y1, x2, y2 of all, pixels counted from 1, the last one in it."""
    names = [f"Maker Model {c} 2012" for c in range(1, 197)]
    rows: dict[str, list[str]] = {"train": [], "test": []}  # the official parts: they are pooled
    for c, own in zip(classes, photographs, strict=True):
        for i, image in enumerate(own):
            part = ("train", "test")[i % 2]
            put(root / part / names[c - 1] / f"{c:03d}{i:02d}.png", image)
            rows[part].append(f"{c:03d}{i:02d}.png,{','.join(map(str, box))},{c}")
    for part, lines in rows.items():
        (root / f"anno_{part}.csv").write_text("\n".join(lines) + "\n")
    (root / "names.csv").write_text("\n".join(names) + "\n")


def write_sop(root: Path, photographs: np.ndarray) -> None:
    """photographs [C, n, H, W, 3]: every second product trains, the others are tested."""
    lists = {"Ebay_train.txt": photographs[::2], "Ebay_test.txt": photographs[1::2]}
    number = 0
    for first, (name, products) in zip((1, 11_319), lists.items(), strict=True):
        lines = ["image_id class_id super_class_id path"]
        for c, own in enumerate(products, first):
            for i, image in enumerate(own):
                number += 1
                file = f"chair_final/{c}_{i}.png"
                put(root / file, image)
                lines.append(f"{number} {c} 3 {file}")
        (root / name).write_text("\n".join(lines) + "\n")
