"""Alignment against least squares, painted landmarks and interpolation pixel by pixel."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from shared.data.align import (
    TEMPLATE,
    Aligned,
    Cropped,
    align,
    centre_square,
    crop_box,
    read_landmarks,
    similarity,
    write_landmarks,
)
from shared.data.items import Encoded, Files

HEADER = "path,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5"


def moved(points, scale, angle, shift):
    """Points turned by `angle`, scaled and shifted, one by one."""
    out = []
    for x, y in points:
        u = scale * (math.cos(angle) * x - math.sin(angle) * y) + shift[0]
        v = scale * (math.sin(angle) * x + math.cos(angle) * y) + shift[1]
        out.append((u, v))
    return np.array(out)


def noise(height=112, width=112, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_template_is_arcfaces():
    assert TEMPLATE.flatten().tolist() == [
        38.2946, 51.6963, 73.5318, 51.5014, 56.0252, 71.7366, 41.5493, 92.3655, 70.7299, 92.2041,
    ]  # fmt: skip


@given(
    st.floats(0.05, 50),
    st.floats(-math.pi, math.pi),
    st.tuples(st.floats(-3000, 3000), st.floats(-3000, 3000)),
)
@settings(deadline=None, derandomize=True)
def test_a_known_similarity_is_recovered(scale, angle, shift):
    matrix = similarity(TEMPLATE, moved(TEMPLATE, scale, angle, shift))
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    assert np.allclose(matrix, [[c, -s, shift[0]], [s, c, shift[1]]], atol=1e-7 * (1 + scale))


@given(st.integers(0, 10**6), st.floats(0.0, 5.0))
@settings(deadline=None, derandomize=True)
def test_noisy_points_give_the_least_squares_of_the_four_parameters(seed, jitter):
    rng = np.random.default_rng(seed)
    noisy = TEMPLATE + jitter * rng.normal(size=(5, 2))
    points = moved(noisy, rng.uniform(0.2, 5), rng.uniform(-3, 3), rng.uniform(-99, 99, 2))
    rows, values = [], []
    for (x, y), (u, v) in zip(points, TEMPLATE, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        values += [u, v]
    a, b, p, q = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0]
    assert np.allclose(similarity(points, TEMPLATE), [[a, -b, p], [b, a, q]], atol=1e-8)


def test_landmarks_that_are_no_face_are_refused_and_profiles_are_not():
    with pytest.raises(ValueError, match="landmarks lie in one point"):
        similarity(np.full((5, 2), 7.0), TEMPLATE)
    for exchanged in (TEMPLATE * [-1, 1], TEMPLATE[[1, 0, 2, 4, 3]]):
        with pytest.raises(ValueError, match="left and right are exchanged"):
            similarity(exchanged, TEMPLATE)
    for bad in (np.nan, np.inf, 1e300):
        with pytest.raises(ValueError, match="landmarks are not finite"):
            similarity(np.where(TEMPLATE == 38.2946, bad, TEMPLATE), TEMPLATE)
    with pytest.raises(ValueError, match=r"landmarks \(4, 2\): expected \(5, 2\)"):
        similarity(TEMPLATE[:4], TEMPLATE)
    for squeezed in (0.0, 0.05, -0.2):  # on a line, and eyes passing each other
        similarity(TEMPLATE * [squeezed, 1], TEMPLATE)


def test_landmarks_at_the_template_leave_every_bit_of_a_face_as_it_is():
    image = noise()
    assert np.array_equal(align(image, TEMPLATE), image)
    shifted = np.zeros((140, 150, 3), np.uint8)
    shifted[9:121, 21:133] = image
    assert np.array_equal(align(shifted, TEMPLATE + [21, 9]), image)


def test_a_face_beyond_the_border_is_filled_with_black():
    image = noise()
    out = align(image, TEMPLATE + [30, -20])  # the crop reaches 30 px over the right, 20 the top
    assert np.array_equal(out[20:, :82], image[:92, 30:])
    assert not out[:20].any() and not out[:, 82:].any()


@pytest.mark.parametrize(("scale", "angle"), [(0.6, 0.3), (2.7, -1.0), (9.0, 3.0)])
def test_painted_landmarks_come_to_the_template(scale, angle):
    points = moved(TEMPLATE, scale, angle, (0, 0))
    points += 20 * scale - points.min(axis=0)
    width, height = (np.ceil(points.max(axis=0)) + 20 * scale).astype(int)
    y, x = np.mgrid[:height, :width]
    for k, (u, v) in enumerate(points):
        dot = 255 * np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * (2 * scale) ** 2))
        image = np.repeat(np.rint(dot).astype(np.uint8)[:, :, None], 3, axis=2)
        for size in (112, 64):
            out = align(image, points, size)[:, :, 0].astype(float)
            found = np.array(ndimage.center_of_mass(out))[::-1]
            assert np.abs(found - TEMPLATE[k] * size / 112).max() < 0.5 * size / 112


def test_pixels_are_bilinear_between_the_four_around_the_position():
    image, rng = noise(70, 90), np.random.default_rng(1)
    points = moved(TEMPLATE, 0.7, 0.4, (15.3, -8.1))
    out = align(image, points, 112)
    to_template = similarity(points, TEMPLATE)
    back = np.linalg.inv(np.vstack([to_template, [0, 0, 1]]))
    wide = np.zeros((72, 92, 3))
    wide[1:-1, 1:-1] = image
    seen = 0
    for row, column in rng.integers(0, 112, (400, 2)):
        x, y, _ = back @ (column, row, 1)
        i, j = math.floor(y), math.floor(x)
        if not (-1 <= i < 70 and -1 <= j < 90):
            assert not out[row, column].any()
            continue
        seen += 1
        four = wide[i + 1 : i + 3, j + 1 : j + 3]
        fy, fx = y - i, x - j
        value = (1 - fy) * ((1 - fx) * four[0, 0] + fx * four[0, 1])
        value += fy * ((1 - fx) * four[1, 0] + fx * four[1, 1])
        assert np.abs(out[row, column] - value).max() <= 0.5 + 1e-6
    assert 100 < seen < 400


# -- boxes ---------------------------------------------------------------------------------------


def test_a_box_is_cut_square_around_its_centre_with_the_margin():
    image = noise(100, 120)
    assert np.array_equal(crop_box(image, (40, 30, 60, 50), 0.0), image[30:50, 40:60])
    assert np.array_equal(crop_box(image, (40, 30, 60, 50), 0.2), image[28:52, 38:62])
    assert np.array_equal(crop_box(image, (40, 30, 60, 40), 0.5), image[20:50, 35:65])
    assert crop_box(image, (40.2, 30.1, 40.6, 30.5), 0.0).shape == (1, 1, 3)


@given(
    st.tuples(st.floats(-30, 45), st.floats(-30, 45), st.floats(1, 60), st.floats(1, 60)),
    st.floats(0, 1),
)
@settings(deadline=None, derandomize=True)
def test_what_lies_outside_the_image_is_black_and_the_rest_in_place(box, margin):
    x, y, w, h = box
    image = noise(40, 50) | 1
    if x >= 50 or y >= 40 or x + w <= 0 or y + h <= 0:
        with pytest.raises(ValueError, match="outside the image of 50 x 40 px"):
            crop_box(image, (x, y, x + w, y + h), margin)
        return
    out = crop_box(image, (x, y, x + w, y + h), margin)
    side = len(out)
    assert out.shape == (side, side, 3)
    assert abs(side - max(w, h) * (1 + margin)) <= 0.5 + 1e-9 or side == 1
    wide = np.zeros((600, 600, 3), np.uint8)
    wide[200:240, 200:250] = image
    left, top = x + w / 2 - side / 2, y + h / 2 - side / 2
    spots = [
        (200 + math.floor(top) + i, 200 + math.floor(left) + j) for i in (0, 1) for j in (0, 1)
    ]
    assert any(np.array_equal(out, wide[i : i + side, j : j + side]) for i, j in spots)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((5, 5, 5, 9), "expected x1 < x2"),
        ((9, 5, 5, 9), "expected x1 < x2"),
        ((5, math.nan, 8, 9), "expected x1 < x2"),
        ((50, 0, 60, 9), "outside the image of 50 x 40 px"),
        ((0, 0, 1e12, 9), "no box of an image of 50 x 40 px"),
    ],
)
def test_a_box_that_is_none_is_refused_before_anything_is_made(box, words):
    with pytest.raises(ValueError, match=words):
        crop_box(noise(40, 50), box, 0.2)


# -- landmark files ------------------------------------------------------------------------------


def line(name, points):
    return ",".join([name, *(str(v) for v in np.asarray(points).flatten().tolist())])


@pytest.mark.parametrize("header", ["", HEADER + "\n", "Path, X1" + HEADER[7:].upper() + "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_landmark_files_with_and_without_header(tmp_path: Path, header: str, mark: str):
    path = tmp_path / "l.csv"
    text = mark + header + line("a/b.jpg", TEMPLATE) + "\n\n" + line('"c,d.jpg"', -TEMPLATE)
    path.write_bytes(text.encode())
    found = read_landmarks(path)
    assert list(found) == ["a/b.jpg", "c,d.jpg"]
    assert np.array_equal(found["a/b.jpg"], TEMPLATE)
    assert np.array_equal(found["c,d.jpg"], -TEMPLATE)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip),
        st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=10, max_size=10),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None, derandomize=True)
def test_what_is_written_is_read_exactly(tmp_path_factory, faces):
    path = tmp_path_factory.getbasetemp() / "round.csv"
    rows = {name: np.array(values).reshape(5, 2) for name, values in faces.items()}
    write_landmarks(path, rows.items())
    assert path.read_text().splitlines()[0] == HEADER
    found = read_landmarks(path)
    assert list(found) == list(rows)
    assert all(np.array_equal(found[name], rows[name]) for name in rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (line("a", TEMPLATE) + "\n" + line("b", TEMPLATE[:4]), "line 2: 9 columns; expected path"),
        (line("a", TEMPLATE) + ",3\n", "line 1: 12 columns"),
        (line("a", TEMPLATE).replace("38.2946", "nan"), "line 1: coordinates of a must be finite"),
        (line("a", TEMPLATE).replace("38.2946", "1e999"), "line 1: coordinates of a"),
        (line("a", TEMPLATE).replace("38.2946", "left"), "line 1: coordinates of a"),
        (line("a", TEMPLATE).replace("38.2946", ""), "line 1: coordinates of a"),
        (f"{line('a', TEMPLATE)}\n{HEADER}\n", "line 2: coordinates of path"),
        (f"{line('a', TEMPLATE)}\n\n{line('a', TEMPLATE)}\n", "line 3: a comes twice"),
        (HEADER + "\n", "no landmarks in it"),
        ("", "no landmarks in it"),
        ('"a', "line 1: unexpected end of data"),
        (b"\xff\xd8\xff\xe0", "not a text file in UTF-8"),
        ("a" * 200_000, "line 1: field larger"),
    ],
)
def test_damaged_landmark_files_name_file_and_line(tmp_path: Path, content, words):
    path = tmp_path / "l.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as caught:
        read_landmarks(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_landmarks_that_cannot_be_read_back_are_not_written(tmp_path: Path):
    path = tmp_path / "l.csv"
    for rows, words in (
        ([("a", TEMPLATE), ("a", TEMPLATE)], "a comes twice"),
        ([("a", TEMPLATE[:4])], r"landmarks of a must be \[5, 2\]"),
        ([("a", TEMPLATE * np.nan)], r"landmarks of a must be \[5, 2\]"),
    ):
        with pytest.raises(ValueError, match=words):
            write_landmarks(path, rows)
        assert not path.exists()


# -- sets ----------------------------------------------------------------------------------------


def faces(count=4):
    """Images of several sizes, the landmarks of all but the third."""
    items = Encoded("set", [noise(120 + k, 130, seed=k) for k in range(count)], [5, 6, 7, 8])
    landmarks = {f"set#{k}": TEMPLATE + [k, k] for k in range(count) if k != 2}
    return items, landmarks


def test_faces_without_landmarks_are_dropped_and_counted():
    items, landmarks = faces()
    part = Aligned(items, landmarks, "drop")
    assert len(part) == 3 and part.labels.tolist() == [5, 6, 8]
    assert [part.name(i) for i in range(3)] == ["set#0", "set#1", "set#3"]
    assert part.report == {"images": 4, "aligned": 3, "dropped": 1}
    for i, k in enumerate((0, 1, 3)):
        assert np.array_equal(part.image(i), items.image(k)[k : k + 112, k : k + 112])
    again = pickle.loads(pickle.dumps(part))
    assert np.array_equal(again.image(2), part.image(2))


def test_faces_without_landmarks_are_taken_from_the_centre_and_counted():
    items, landmarks = faces()
    part = Aligned(items, landmarks, "centre-crop", size=64)
    assert len(part) == 4 and part.labels.tolist() == [5, 6, 7, 8]
    assert part.report == {"images": 4, "aligned": 3, "centre-crop": 1}
    square = Image.fromarray(items.image(2)[:, 4:126]).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(part.image(2), np.array(square))
    assert part.image(0).shape == (64, 64, 3)
    assert centre_square(noise(50, 31), 31).shape == (31, 31, 3)


def test_faces_without_landmarks_are_an_error_that_names_and_counts_them():
    items, landmarks = faces()
    with pytest.raises(ValueError, match=r"^set#2: no landmarks, nor have 0 others of 4; add"):
        Aligned(items, landmarks, "error")
    landmarks["set#2"] = TEMPLATE
    part = Aligned(items, landmarks, "error")
    assert part.report == {"images": 4, "aligned": 4}


@pytest.mark.parametrize("policy", ["centre-crop", "drop", "error"])
def test_a_landmark_file_of_another_set_is_an_error_under_every_policy(policy):
    items, _ = faces()
    with pytest.raises(ValueError, match="the file names other#0, the data set set#0"):
        Aligned(items, {"other#0": TEMPLATE}, policy)


def test_landmarks_of_no_face_name_the_image():
    items, landmarks = faces()
    landmarks["set#3"] = TEMPLATE * [-1, 1]
    with pytest.raises(ValueError, match=r"^set#3: its landmarks are mirrored"):
        Aligned(items, landmarks, "drop")
    with pytest.raises(ValueError, match="policy 'skip'"):
        Aligned(items, landmarks, "skip")  # type: ignore[arg-type]


def test_files_with_boxes_are_cut_to_them(tmp_path: Path):
    for k in range(2):
        Image.fromarray(noise(50, 60, seed=k)).save(tmp_path / f"{k}.png")
    boxes = np.array([[10, 10, 20, 20], [70, 0, 80, 9.0]])
    part = Cropped(Files(tmp_path, ["0.png", "1.png"], [3, 4], boxes), 0.2)
    assert np.array_equal(part.image(0), noise(50, 60)[9:21, 9:21])
    assert part.labels.tolist() == [3, 4] and len(part) == 2
    with pytest.raises(ValueError, match=r"^1\.png: box \(70, 0, 80, 9\): outside the image"):
        part.image(1)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0\.png: not a readable image"):
        part.image(0)
    with pytest.raises(ValueError, match="no boxes"):
        Cropped(Files(tmp_path, ["0.png"], [3]), 0.2)
    with pytest.raises(ValueError, match="margin -0.1"):
        Cropped(Files(tmp_path, ["0.png"], [3], boxes[:1]), -0.1)
