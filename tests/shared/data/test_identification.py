import hashlib
import io
import pickle

import numpy as np
import pytest
import scipy.io
from PIL import Image

from shared.data import identification
from shared.data.identification import (
    survface,
    survface_pairs,
    survface_train,
    tinyface,
    tinyface_train,
    uccs,
)
from shared.evaluate.identify import closed_set, open_set
from shared.evaluate.verify import verification


def png(level=0, size=(5, 4)):
    stream = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


PIXELS = png()


def put(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(PIXELS)


def column(names):
    """A MATLAB cell column of strings."""
    cells = np.empty((len(names), 1), object)
    cells[:, 0] = names
    return cells


def save_list(path, prefix, names, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {f"{prefix}_set": column(names), f"{prefix}_ids": np.array([ids], np.uint16).T}
    scipy.io.savemat(path, lists, do_compression=True)


def raises(words, call, *arguments, **options):
    """ValueError in one line."""
    with pytest.raises(ValueError, match=words) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


# -- TinyFace ------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """The release in small: ids that are neither dense nor in the order of the names."""
    test = tmp_path / "tinyface" / "Testing_Set"
    put(test / "Gallery_Match", "7_1.jpg", "7_2.jpg", "40_1.jpg")
    put(test / "Probe", "7_9.jpg", "40_9.jpg")
    put(test / "Gallery_Distractor", "b.jpg", "a.jpg", ".hidden.jpg", "Thumbs.db")
    gallery = ["40_1.jpg", "7_1.jpg", "7_2.jpg"]
    save_list(test / "gallery_match_img_ID_pairs.mat", "gallery", gallery, [40, 7, 7])
    save_list(test / "probe_img_ID_pairs.mat", "probe", ["40_9.jpg", "7_9.jpg"], [40, 7])
    return tmp_path / "tinyface"


def test_tinyface_takes_ids_and_order_from_the_lists(tiny):
    found = tinyface(tiny, counts="any")
    assert found.probes.labels.tolist() == [40, 7]
    assert [found.probes.name(i) for i in range(2)] == [
        "Testing_Set/Probe/40_9.jpg",
        "Testing_Set/Probe/7_9.jpg",
    ]
    assert found.gallery.files[:3] == [
        f"Testing_Set/Gallery_Match/{name}" for name in ("40_1.jpg", "7_1.jpg", "7_2.jpg")
    ]
    assert found.unmated is None
    assert tinyface(tiny.parent, counts="any").gallery.files == found.gallery.files


def test_tinyface_distractors_are_gallery_that_no_probe_matches(tiny):
    found = tinyface(tiny, counts="any")
    assert found.distractors == 2
    assert found.gallery.files[3:] == [f"Testing_Set/Gallery_Distractor/{c}.jpg" for c in "ab"]
    assert found.gallery.labels.tolist() == [40, 7, 7, -1, -1]
    embedding = np.eye(5)[[0, 1]]
    gallery = np.eye(5)[[0, 2, 3, 1, 4]]  # the second probe is like a distractor
    result = closed_set(embedding, found.probes.labels, gallery, found.gallery.labels, ranks=(1,))
    assert result.cmc[1] == 0.5


def test_items_decode_when_asked_and_survive_pickling(tiny):
    (tiny / "Testing_Set/Probe/7_9.jpg").write_bytes(png(200, (9, 6)))
    (tiny / "Testing_Set/Probe/40_9.jpg").write_bytes(b"damaged")
    probes = pickle.loads(pickle.dumps(tinyface(tiny, counts="any"))).probes
    image = probes.image(1)
    assert image.shape == (6, 9, 3) and image.dtype == np.uint8 and (image[..., 0] == 200).all()
    raises(r"Probe/40_9\.jpg", probes.image, 0)


def test_tinyface_counts_are_the_published_ones(tiny):
    assert identification.TINYFACE == {
        "probes": 3728,
        "gallery images": 4443,
        "distractors": 153428,
    }
    assert identification.TINYFACE_TRAIN == {"images": 7804, "identities": 2570}
    raises("2 probes instead of 3,728, 3 gallery images instead of 4,443, 2 distr", tinyface, tiny)


def test_tinyface_with_the_published_counts_is_taken(tiny, monkeypatch):
    counts = {"probes": 2, "gallery images": 3, "distractors": 2}
    monkeypatch.setattr(identification, "TINYFACE", counts)
    assert len(tinyface(tiny).gallery) == 5
    (tiny / "Testing_Set/Gallery_Distractor/a.jpg").unlink()
    raises("1 distractors instead of 2", tinyface, tiny)


def test_missing_distractors_are_an_error_not_a_zero(tiny):
    folder = tiny / "Testing_Set/Gallery_Distractor"
    for path in folder.iterdir():
        path.unlink()
    raises("Gallery_Distractor: no image in it", tinyface, tiny, counts="any")
    folder.rmdir()
    raises("Gallery_Distractor: cannot be listed", tinyface, tiny, counts="any")


def test_list_and_folder_must_agree_both_ways(tiny):
    put(tiny / "Testing_Set/Probe", "3_1.jpg", "4_1.jpg")
    raises(
        r"Probe: 2 images that probe_img_ID_pairs\.mat does not name: '3_1\.jpg'",
        tinyface,
        tiny,
        counts="any",
    )
    for name in ("3_1.jpg", "4_1.jpg", "7_9.jpg"):
        (tiny / "Testing_Set/Probe" / name).unlink()
    raises(
        r"probe_img_ID_pairs\.mat: 1 of the 2 images .* '7_9\.jpg'", tinyface, tiny, counts="any"
    )


@pytest.mark.parametrize(
    "name", ["../Gallery_Match/7_1.jpg", "../Probe/7_9.jpg", "./7_9.jpg", "/etc/passwd", ""]
)
def test_a_list_cannot_point_out_of_its_folder(tiny, name):
    save_list(tiny / "Testing_Set/probe_img_ID_pairs.mat", "probe", ["40_9.jpg", name], [40, 7])
    words = "1 of the 2" if name else "expected a cell array of file names"
    raises(rf"probe_img_ID_pairs\.mat: {words}", tinyface, tiny, counts="any")


def test_damaged_lists_are_refused_with_their_name(tiny):
    path = tiny / "Testing_Set/probe_img_ID_pairs.mat"
    names = column(["40_9.jpg", "7_9.jpg"])
    for content, words in (
        ({"probe_set": names, "probe_ids": [40]}, "2 images, but 1 ids"),
        ({"probe_set": names, "probe_ids": [40, -1]}, "whole numbers from 0"),
        ({"probe_set": names, "probe_ids": [40, 7.5]}, "whole numbers from 0"),
        ({"probe_set": names, "probe_ids": [40, np.nan]}, "whole numbers from 0"),
        ({"probe_set": names, "probe_ids": column(["a", "b"])}, "whole numbers from 0"),
        ({"probe_set": names}, r"no variable probe_ids \(there are: \['probe_set'\]\)"),
        ({"probe_set": [1, 2], "probe_ids": [40, 7]}, "expected a cell array of file names"),
        ({"probe_set": column(["40_9.jpg"] * 2), "probe_ids": [40, 40]}, "names 40_9.jpg twice"),
        ({"probe_set": names, "probe_ids": [40, 8]}, r"no image of the identity of 1 probes.* 8 "),
    ):
        scipy.io.savemat(path, content)
        raises(rf"\.mat: .*{words}", tinyface, tiny, counts="any")
    path.write_bytes(path.read_bytes()[:-9])
    raises(r"probe_img_ID_pairs\.mat: not a readable MATLAB file", tinyface, tiny, counts="any")
    path.unlink()
    raises(r"no TinyFace in it.*probe_img_ID_pairs\.mat", tinyface, tiny, counts="any")


def test_a_list_of_one_image_is_a_list(tiny):
    (tiny / "Testing_Set/Probe/7_9.jpg").unlink()
    save_list(tiny / "Testing_Set/probe_img_ID_pairs.mat", "probe", ["40_9.jpg"], [40])
    assert tinyface(tiny, counts="any").probes.labels.tolist() == [40]


def test_training_folders_are_labelled_in_the_order_of_their_names(tmp_path, monkeypatch):
    put(tmp_path / "Training_Set/18", "18_2.jpg", "18_1.jpg")
    put(tmp_path / "Training_Set/2", "2_1.jpg", "._2_1.jpg")
    found = tinyface_train(tmp_path, counts="any")
    assert found.names == ("18", "2")
    assert found.items.labels.tolist() == [0, 0, 1]
    assert found.items.name(1) == "Training_Set/18/18_2.jpg"
    raises("3 images instead of 7,804, 2 identities instead of 2,570", tinyface_train, tmp_path)
    monkeypatch.setattr(identification, "TINYFACE_TRAIN", {"images": 3, "identities": 2})
    assert len(tinyface_train(tmp_path).items) == 3
    (tmp_path / "Training_Set/3").mkdir()
    raises("Training_Set/3: no image", tinyface_train, tmp_path, counts="any")
    raises("training_set: no such folder", survface_train, tmp_path, counts="any")


# -- QMUL-SurvFace -------------------------------------------------------------------------------


@pytest.fixture(params=["Face_Identification_Test_Set", "Face_Identification_Evaluation"])
def surv(tmp_path, request):
    test = tmp_path / "Face_Identification_Test_Set"
    put(test / "gallery", "100_cam1_1.jpg", "200_cam1_1.jpg")
    put(test / "mated_probe", "100_cam2_1.jpg", "200_cam2_1.jpg", "200_cam3_1.jpg")
    put(test / "unmated_probe", "300_cam1_1.jpg", "distractors_1.jpg")
    lists = tmp_path / request.param
    gallery, mated = sorted(p.name for p in (test / "gallery").iterdir()), ["200_cam3_1.jpg"]
    mated += ["100_cam2_1.jpg", "200_cam2_1.jpg"]
    save_list(lists / "gallery_img_ID_pairs.mat", "gallery", gallery, [2, 1])
    save_list(lists / "mated_probe_img_ID_pairs.mat", "mated_probe", mated, [1, 2, 1])
    return tmp_path


def test_survface_unmated_images_are_probes_never_gallery(surv):
    found = survface(surv, counts="any")
    assert found.gallery.labels.tolist() == [2, 1] and found.distractors == 0
    assert found.probes.labels.tolist() == [1, 2, 1]  # of the list, not of first appearance
    assert found.probes.name(0).endswith("mated_probe/200_cam3_1.jpg")
    assert found.unmated.labels.tolist() == [-1, -1]
    assert not any("unmated" in file for file in found.gallery.files)
    mated, gallery = np.eye(4)[[1, 0, 1]], np.eye(4)[[0, 1]]
    unmated = np.eye(4)[[2, 3]]
    result = open_set(
        mated, found.probes.labels, unmated, gallery, found.gallery.labels, rank=1, fpir=(0.5,)
    )
    assert result.tpir[0.5] == 1


def test_survface_counts_are_the_ones_that_could_be_checked(surv, monkeypatch):
    assert identification.SURVFACE == {"mated probes": 60423, "gallery images": 60294}
    assert identification.SURVFACE_TRAIN == {"identities": 5319}
    raises("3 mated probes instead of 60,423, 2 gallery images instead of 60,294", survface, surv)
    monkeypatch.setattr(identification, "SURVFACE", {"mated probes": 3, "gallery images": 2})
    assert len(survface(surv).unmated) == 2
    put(surv / "training_set/5", "5_1.jpg")
    raises("1 identities instead of 5,319", survface_train, surv)
    assert survface_train(surv, counts="any").items.name(0) == "training_set/5/5_1.jpg"


def test_survface_without_a_part_is_refused(surv):
    for name in ("unmated_probe", "gallery"):
        (surv / f"Face_Identification_Test_Set/{name}").rename(surv / name)
        raises(f"{name}: cannot be listed", survface, surv, counts="any")
        (surv / name).rename(surv / f"Face_Identification_Test_Set/{name}")
    for path in surv.rglob("mated_probe_img_ID_pairs.mat"):
        path.unlink()
    raises(r"mated_probe_img_ID_pairs\.mat: no such file", survface, surv, counts="any")


def save_pairs(root, kind, pairs):
    cells = np.empty((len(pairs), 2), object)
    for i, pair in enumerate(pairs):
        cells[i] = pair
    path = root / f"Face_Verification_Test_Set/{kind}_pairs_names.mat"
    scipy.io.savemat(path, {f"{kind}_pairs_names": cells})
    return path


def test_survface_pairs_are_the_lists_with_both_kinds_in_every_fold(tmp_path):
    names = [f"{person}_cam{camera}_1.jpg" for person in range(30) for camera in (1, 2)]
    put(tmp_path / "Face_Verification_Test_Set/verification_images", *names, "unused.jpg")
    positive = [(names[2 * i], names[2 * i + 1]) for i in range(30)]
    negative = [(names[2 * i], names[(2 * i + 3) % 60]) for i in range(20)]
    save_pairs(tmp_path, "positive", positive)
    save_pairs(tmp_path, "negative", negative)
    pairs = survface_pairs(tmp_path)
    named = [
        tuple(pairs.items.name(i).split("/")[-1] for i in pair)
        for pair in zip(pairs.first, pairs.second, strict=True)
    ]
    assert [pair for pair, same in zip(named, pairs.same, strict=True) if same] == positive
    assert [pair for pair, same in zip(named, pairs.same, strict=True) if not same] == negative
    for fold in np.array_split(pairs.same, 10):
        assert fold.any() and not fold.all()
    assert len(pairs.items) == 60 and pairs.items.image(0).shape == (4, 5, 3)
    embeddings = np.random.default_rng(0).normal(size=(60, 8))
    verification(embeddings[pairs.first], embeddings[pairs.second], pairs.same)


def test_survface_pairs_with_missing_or_odd_names_are_refused(tmp_path):
    put(tmp_path / "Face_Verification_Test_Set/verification_images", "a.jpg", "b.jpg")
    save_pairs(tmp_path, "positive", [("a.jpg", "b.jpg")])
    path = save_pairs(tmp_path, "negative", [("a.jpg", "c.jpg")])
    raises(r"negative_pairs_names\.mat: 1 of the 2 images .* 'c\.jpg'", survface_pairs, tmp_path)
    scipy.io.savemat(path, {"negative_pairs_names": column(["a.jpg", "b.jpg", "a.jpg"])})
    raises("expected two names a pair", survface_pairs, tmp_path)
    path.unlink()
    raises(r"negative_pairs_names\.mat: no such file", survface_pairs, tmp_path)


# -- UCCS ----------------------------------------------------------------------------------------


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def subjects(root, sizes):
    for number, size in enumerate(sizes):
        put(root / f"s{number:03}", *[f"{i}.png" for i in range(size)])


def test_uccs_split_is_the_documented_function_of_seed_and_names(tmp_path):
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 14, size=230)
    subjects(tmp_path, sizes)
    found = uccs(tmp_path, seed=3, counts="any")
    able = [f"s{k:03}" for k in range(230) if sizes[k] >= 5]
    assert len(able) > 180
    drawn = sorted(sorted(able, key=lambda s: digest(f"3/{s}"))[:180])
    assert found.names == tuple(drawn)
    train, test = set(), set()
    for label, subject in enumerate(drawn):
        files = [f"{subject}/{i}.png" for i in range(sizes[int(subject[1:])])]
        files.sort(key=lambda file: digest(f"3/{file}"))
        test |= {(file, label) for file in files[: len(files) // 5]}
        train |= {(file, label) for file in files[len(files) // 5 :]}
    assert set(zip(found.train.files, found.train.labels, strict=True)) == train
    assert set(zip(found.test.files, found.test.labels, strict=True)) == test
    assert set(found.test.labels) == set(found.train.labels) == set(range(180))
    assert found.train.boxes is None and found.test.image(0).shape == (4, 5, 3)


def test_uccs_split_changes_with_the_seed_and_little_with_a_lost_image(tmp_path):
    subjects(tmp_path, [10] * 200)
    one, two = (uccs(tmp_path, seed=seed, counts="any") for seed in (0, 1))
    assert one.names != two.names
    lost = one.train.files[0]
    (tmp_path / lost).unlink()
    again = uccs(tmp_path, seed=0, counts="any")
    assert again.names == one.names
    assert set(one.train.files) - set(again.train.files) <= {lost, *again.test.files}
    assert len(set(one.test.files) ^ set(again.test.files)) == 1  # 9 // 5: one test image, not two


def test_uccs_draws_from_subjects_with_enough_images_only(tmp_path):
    subjects(tmp_path, [4, 5, 20, 30])
    assert uccs(tmp_path, counts="any").names == ("s001", "s002", "s003")
    assert uccs(tmp_path, fewest=20, counts="any").names == ("s002", "s003")
    raises("1 subjects with 21 images or more", uccs, tmp_path, fewest=21, counts="any")
    raises("fewest=4", uccs, tmp_path, fewest=4, counts="any")


def test_uccs_counts_are_of_the_whole_set_and_of_the_draw(tmp_path, monkeypatch):
    assert identification.UCCS == {"subjects": 1732, "images": 16149}
    assert identification.UCCS_DRAWN == {"drawn subjects": 180}
    subjects(tmp_path, [6] * 150)
    raises("150 subjects instead of 1,732, 900 images instead of 16,149", uccs, tmp_path)
    monkeypatch.setattr(identification, "UCCS", {"subjects": 150, "images": 900})
    raises("150 drawn subjects instead of 180", uccs, tmp_path)
    monkeypatch.setattr(identification, "UCCS_DRAWN", {"drawn subjects": 150})
    found = uccs(tmp_path)
    assert (len(found.train), len(found.test)) == (150 * 5, 150)


HEADER = "FILE,FACE_ID,SUBJECT_ID,FACE_X,FACE_Y,FACE_WIDTH,FACE_HEIGHT"


@pytest.fixture
def challenge(tmp_path):
    """12 whole images with three faces each: subjects 1 and 20, and somebody unknown."""
    put(tmp_path / "validation_images", *[f"i{i}.jpg" for i in range(12)])
    put(tmp_path / "gallery_images/0001", "0001_0.png")
    (tmp_path / "gallery.csv").write_text("FILE,SUBJECT_ID,REYE_X,REYE_Y\n0001_0.png,1,3,4\n")
    lines = [
        f"i{i}.jpg,{3 * i + k},{subject},{10 * k + 0.5},{i},{30},{40}"
        for i in range(12)
        for k, subject in enumerate((1, 20, -1))
    ]
    (tmp_path / "validation.csv").write_text("\r\n".join([HEADER, *lines]) + "\r\n")
    return tmp_path


def test_uccs_challenge_gives_boxes_on_whole_images_and_leaves_out_the_unknown(challenge):
    found = uccs(challenge, counts="any")
    assert found.names == ("1", "20")
    assert (len(found.train), len(found.test)) == (20, 4)
    faces = set()
    for part in (found.train, found.test):
        assert part.boxes.shape == (len(part), 4)
        for file, label, box in zip(part.files, part.labels, part.boxes.tolist(), strict=True):
            i = int(file.removeprefix("validation_images/i").removesuffix(".jpg"))
            x = 10 * label + 0.5
            assert box == [x, i, x + 30, i + 40]
            faces.add((file, label))
    assert len(faces) == 24  # no face in both parts, gallery crops in neither
    assert found.train.image(0).shape == (4, 5, 3)


def test_uccs_challenge_split_is_the_documented_function_of_the_lines(challenge):
    found = uccs(challenge, seed=9, counts="any")
    for label in range(2):
        keys = [f"validation_images/i{i}.jpg,{10 * label + 0.5:g},{i},30,40" for i in range(12)]
        keys.sort(key=lambda key: digest(f"9/{key}"))
        own = {f for f, k in zip(found.test.files, found.test.labels, strict=True) if k == label}
        assert own == {key.split(",")[0] for key in keys[:2]}
    raises("2 drawn subjects instead of 180", uccs, challenge)


@pytest.mark.parametrize(
    "line, words",
    [
        ("gone.jpg,1,1,1,1,1,1", "no image 'validation_images/gone.jpg'"),
        ("../gallery_images/0001/0001_0.png,1,1,1,1,1,1", "no image"),
        ("i1.jpg,1,1,1,1,1", "expected 7 fields"),
        ("i1.jpg,1,1,1,1,1,1,1", "expected 7 fields"),
        ("i1.jpg,1,one,1,1,1,1", "invalid literal"),
        ("i1.jpg,1,1,1,1,nan,1", "box"),
        ("i1.jpg,1,1,1,1,inf,1", "box"),
        ("i1.jpg,1,1,1,1,0,1", "box"),
        ("i0.jpg,99,1,0.5,0,30,40", "the face of an earlier line"),
        ('"i1.jpg"x,1,1,1,1,1,1', "expected after"),
        ("i1.jpg,1,\xff,1,1,1,1", "utf-8"),
    ],
)
def test_damaged_lines_are_refused_with_their_number(challenge, line, words):
    path = challenge / "validation.csv"
    path.write_bytes(path.read_bytes() + line.encode("latin-1"))
    raises(rf"validation\.csv, line \d+: .*{words}", uccs, challenge, counts="any")


def test_uccs_without_either_layout_is_refused(tmp_path):
    raises("no folders in it", uccs, tmp_path, counts="any")
    raises("gone: no such folder", uccs, tmp_path / "gone", counts="any")
    put(tmp_path / "validation_images", "a.jpg")
    (tmp_path / "validation.csv").write_text("FILE,SUBJECT_ID\na.jpg,1\n")
    raises("no column FACE_HEIGHT, FACE_WIDTH, FACE_X, FACE_Y", uccs, tmp_path, counts="any")
    (tmp_path / "validation.csv").write_text("")
    raises("no column", uccs, tmp_path, counts="any")
