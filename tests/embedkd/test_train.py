"""EmbedKD's loop and scores as a whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import crrcd.train
import embedkd.train
from embedkd.config import Config, arms, weights
from embedkd.labels import restrict
from embedkd.losses import absolute, relative, triplet
from embedkd.train import load_student, train
from shared.config import MATCHED, locate, to_dict
from shared.data.pipeline import Loader
from shared.data.samplers import HalfLabelled, PKSampler
from shared.data.sets import DataSet, load
from shared.models.recogniser import Recogniser, read_metadata
from tests.conftest import tiny
from tests.embedkd.small import ROWS, logged, table
from tests.embedkd.small import tiny as small
from tests.forked import forked, ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    torch.set_num_threads(1)
    return train(small(tmp_path_factory.mktemp("runs"), cache))


def same_bits(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_table_has_every_student_and_both_views_of_the_teacher(run: Path) -> None:
    assert list(table(run)["rows"]) == ["teacher, HR", "teacher, LR", *ROWS]
    assert "recall1" in table(run)["columns"]
    assert (table(run)["own"], table(run)["reference"]) == ("rel", "alone")


def test_loss_terms_add_up_to_eq7(run: Path) -> None:
    found = arms(Config())
    assert {x["phase"] for x in logged(run)} == set(ROWS)
    for x in logged(run):
        kd = sum(weight * x[term] for term, weight in weights(found[x["phase"]]).items())
        assert x["loss"] == pytest.approx(x["ml"] + kd, rel=1e-5)


def test_all_students_start_from_the_same_weights_and_see_the_same_images(run: Path) -> None:
    first = {x["phase"]: x["ml"] for x in logged(run) if x["step"] == 0}
    assert len(first) == len(ROWS) and len(set(first.values())) == 1


def test_the_first_step_is_the_equations_on_unit_embeddings(tmp_path: Path) -> None:
    """Eq. 1, 4, 5 on what a fresh student and the kept teacher say of the first P x K batch."""
    config = small(tmp_path, tmp_path / "cache", students=("abs", "rel"))
    config = replace(config, optim=replace(config.optim, epochs=1))
    run = train(config)
    data = load(config.data, cache=locate(config.cache), teacher_identities=8)
    sampler = PKSampler(data.train.labels, 4, 4, seed=config.seed)
    loader = Loader(data.train, config.data, 16, seed=config.seed, device=torch.device("cpu"),
                    sampler=sampler)  # fmt: skip
    batch = next(loader.epoch(0))
    torch.manual_seed(config.seed)
    student = Recogniser(config.student, 16, data.classes)
    teacher = Recogniser(config.teacher, 64, data.teacher_classes).eval()
    (kept,) = (tmp_path / "cache" / "teachers").glob("*/teacher.safetensors")
    teacher.load_state_dict(load_file(kept))
    with torch.no_grad():
        e_s = F.normalize(student.train()(batch.x_l()))
        e_t = F.normalize(teacher(batch.x_h()))
        wanted = {
            "ml": triplet(e_s, batch.y, 0.2), "abs": absolute(e_s, e_t),
            "rel": relative(e_s, e_t),
        }  # fmt: skip
    for x in logged(run):
        if x["step"] == 0:
            for term in wanted.keys() & x.keys():
                assert x[term] == pytest.approx(float(wanted[term]), rel=1e-4)


def test_the_teachers_loss_of_labelled_and_of_unlabelled_images_is_a_sum(tmp_path: Path) -> None:
    """Sec. 5.2: two mechanisms on two sets. The first step of the student, by the equations."""
    config = small(tmp_path, tmp_path / "cache", labelled=0.5, images_per_class=2,
                   students=("abs+unlabelled", "rel+unlabelled", "rel-only"))  # fmt: skip
    config = replace(config, optim=replace(config.optim, epochs=1, batch=8),
                     relative_mode="frobenius")  # fmt: skip
    run = train(config)
    data = load(config.data, cache=locate(config.cache), teacher_identities=8)
    data, labelled = restrict(data, config)
    teacher = Recogniser(config.teacher, 64, data.teacher_classes).eval()
    (kept,) = (tmp_path / "cache" / "teachers").glob("*/teacher.safetensors")
    teacher.load_state_dict(load_file(kept))
    first = {x["phase"]: x for x in logged(run) if x["step"] == 0}
    for p, arms_of in ((4, ("abs", "rel")), (0, ("rel",))):
        sampler = HalfLabelled(data.train.labels, labelled, p, 2, unlabelled=8, seed=config.seed)
        loader = Loader(data.train, config.data, sampler.size, seed=config.seed,
                        device=torch.device("cpu"), sampler=sampler)  # fmt: skip
        batch = next(loader.epoch(0))
        torch.manual_seed(config.seed)
        student = Recogniser(config.student, 16, data.classes)
        with torch.no_grad():
            e_s = F.normalize(student.train()(batch.x_l())).double()
            e_t = F.normalize(teacher(batch.x_h())).double()
        sets = [range(8), range(8, 16)] if p else [range(8)]
        wanted = {"abs": 0.0, "rel": 0.0}
        for images in sets:
            wanted["abs"] += sum(float((e_s[i] - e_t[i]).norm()) for i in images) / 8
            squares = 0.0
            for i in images:
                for j in images:
                    d_s, d_t = float((e_s[i] - e_s[j]).norm()), float((e_t[i] - e_t[j]).norm())
                    squares += (d_s - d_t) ** 2
            wanted["rel"] += squares**0.5
        for term in arms_of:
            found = first[f"{term}+unlabelled" if p else f"{term}-only"][term]
            assert found == pytest.approx(wanted[term], rel=1e-4)


def test_batches_that_cannot_be_made_are_refused_before_a_teacher_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, tmp_path / "cache", labelled=0.5, unlabelled=999,
                   students=("alone", "rel+unlabelled"))  # fmt: skip
    monkeypatch.setattr(embedkd.train.teacher, "get", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match="24 unlabelled images do not give 999 for a batch"):
        train(config)


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path: Path, cache: Path) -> None:
    config = small(tmp_path, cache, students=("rel",), checkpoint_seconds=0.0)
    whole = train(replace(config, folder=str(tmp_path / "whole")))
    part = tmp_path / "part"
    stop = (
        "import sys; from pathlib import Path\n"
        "from shared.phase import Phase\n"
        "from tests.embedkd.small import tiny; from embedkd.train import train\n"
        "log = Phase.log\n"
        "def once(self, batch, **terms):\n"
        "    if self.name == 'rel' and self.step == 7: sys.exit(7)\n"
        "    return log(self, batch, **terms)\n"
        "Phase.log = once\n"
        f"train(tiny(Path({str(tmp_path)!r}), Path({str(cache)!r}), students=('rel',),\n"
        f"      checkpoint_seconds=0.0, folder={str(part)!r}))\n"
    )
    assert forked("-c", stop).returncode == 7
    assert not (part / "results.json").exists()
    train(replace(config, folder=str(part), resume=str(part)))
    for name in ("student.safetensors", "students/rel.safetensors"):
        assert same_bits(whole / name, part / name)
    assert table(whole)["rows"] == table(part)["rows"]


def test_unlabelled_images_never_enter_the_triplet_loss(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong labels of them change no bit; their pictures reach the relative teacher."""
    students = ("rel", "rel+unlabelled", "rel-only")
    config = small(tmp_path, cache, labelled=0.5, images_per_class=2, students=students)
    config = replace(config, optim=replace(config.optim, epochs=2, batch=8))
    right = train(replace(config, folder=str(tmp_path / "right")))

    def poisoned(data: DataSet, config: Config) -> tuple[DataSet, torch.Tensor]:
        data, labelled = restrict(data, config)
        data.train.labels[~labelled] = 0
        return data, labelled

    monkeypatch.setattr(embedkd.train, "restrict", poisoned)
    wrong = train(replace(config, folder=str(tmp_path / "wrong")))
    for arm in students:
        name = f"students/{arm}.safetensors"
        assert same_bits(right / name, wrong / name)
    steps = {arm: [x for x in logged(right) if x["phase"] == arm] for arm in students}
    assert steps["rel"][0]["ml"] != steps["rel+unlabelled"][0]["ml"]  # batch norm sees them
    assert steps["rel"][0]["rel"] != steps["rel+unlabelled"][0]["rel"]
    assert all(x["ml"] == 0 and x["rel"] > 0 for x in steps["rel-only"])


def test_the_teacher_of_half_the_labels_sees_these_images_only(tmp_path: Path, cache: Path) -> None:
    config = small(tmp_path, cache, labelled=0.5)
    data = load(config.data, cache=locate(config.cache), teacher_identities=24)
    half, labelled = restrict(data, config)
    assert half.teacher_classes == data.classes and half.fingerprint != data.fingerprint
    assert half.teacher_train.labels.bincount().tolist() == [3] * 8
    numbers, pixels = next(half.teacher_train.batches([torch.arange(24)]))
    assert torch.equal(numbers, torch.arange(24))
    _, own = next(data.train.batches([labelled.nonzero()[:, 0]]))
    assert torch.equal(pixels, own)
    assert restrict(data, replace(config, labelled=1.0))[0] is data


def test_with_a_head_the_task_loss_is_that_of_the_other_papers(tmp_path: Path, cache: Path) -> None:
    """matched: every cross-entropy of CRRCD's student alone, on the same shuffled batches."""
    theirs = tiny(tmp_path, cache)
    own = Config(
        data=theirs.data, teacher=theirs.teacher, student=MATCHED["student"], optim=theirs.optim,
        students=("alone", "rel"), precision="fp32", threads=1, log_every=1,
        evaluate_every=2, runs=theirs.runs, cache=theirs.cache, report=False,
    )  # fmt: skip
    wanted = [x["cls"] for x in logged(crrcd.train.train(theirs)) if x["phase"] == "alone"]
    found = logged(train(own))
    assert [x["ml"] for x in found if x["phase"] == "alone"] == wanted
    assert found[0]["ml"] == [x["ml"] for x in found if x["phase"] == "rel"][0]


# Batch norm frozen: without it, ranks of unequal images give other statistics.
RANKED = """
import json, sys, torch
from embedkd.config import Config
from embedkd.train import train
from shared.config import from_dict
torch.nn.modules.batchnorm._BatchNorm.train = (
    lambda self, mode=True: torch.nn.Module.train(self, False))
train(from_dict(Config, json.loads(sys.argv[1])))
"""


def test_two_gloo_ranks_give_the_losses_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triplets and pairs of the global batch: halves of it would give other ones."""
    config = small(tmp_path, tmp_path / "cache", labelled=0.5, images_per_class=2,
                   students=("rel+unlabelled", "abs+at"))  # fmt: skip
    config = replace(config, optim=replace(config.optim, epochs=2, batch=8, lr=1e-3))
    two = replace(config, folder=str(tmp_path / "two"))
    for done in ranks(2, "-c", RANKED, json.dumps(to_dict(two))):
        assert done.returncode == 0, done.stderr[-3000:]
    frozen = lambda self, mode=True: torch.nn.Module.train(self, False)  # noqa: E731
    monkeypatch.setattr(torch.nn.modules.batchnorm._BatchNorm, "train", frozen)
    losses = logged(train(replace(config, folder=str(tmp_path / "one")))), logged(tmp_path / "two")
    assert len(losses[0]) == len(losses[1]) > 8
    for a, b in zip(*losses, strict=True):
        for key in a.keys() - {"phase"}:
            assert b[key] == pytest.approx(a[key], rel=2e-5, abs=2e-5), (key, a, b)


def test_a_student_is_used_as_the_readme_says(run: Path) -> None:
    student = load_student(run)
    assert same_bits(run / "student.safetensors", run / "students" / "rel.safetensors")
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    assert student(images).shape == (5, student.recogniser.dim)
    facts = read_metadata(run / "student.safetensors")
    assert facts["task"] == "faces"
    with pytest.raises(ValueError, match="no student 'embedkd'"):
        load_student(run, "embedkd")


def test_the_best_epoch_is_of_development_classes(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = [x for x in lines if "development" in x and x["phase"] == "rel"]
    assert [x["epoch"] for x in scored] == [2, 4]
    best = max(scored, key=lambda x: x["development"])
    facts = read_metadata(run / "students" / "rel-best.safetensors")
    assert facts["epoch"] == str(best["epoch"])
