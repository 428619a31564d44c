"""Teachers without classes, teachers that start from weights, and any network as a teacher."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from crrcd.config import Config
from shared import teacher
from shared.config import Data, Network, Optim, Teacher, to_dict
from shared.data.pipeline import Loader, Part, Resident
from shared.data.samplers import PKSampler
from shared.data.sets import DataSet
from shared.models.recogniser import Recogniser, save
from shared.run import Run
from shared.teacher import FrozenTeacher
from tests.forked import forked, ranks

DATA = Data(hr=16, lr=4, shift=4, shift_step=4)
CLASSES, EACH = 6, 8


def images() -> Resident:
    """A random picture for each class, and noise on it for each image."""
    g = torch.Generator().manual_seed(0)
    kinds = torch.randint(40, 216, (CLASSES, 3, 16, 16), generator=g).repeat_interleave(EACH, 0)
    noise = torch.randint(-39, 40, kinds.shape, generator=g)
    return Resident((kinds + noise).to(torch.uint8), torch.arange(CLASSES).repeat_interleave(EACH))


def of(seen: Resident | Part) -> DataSet:
    return DataSet("faces", seen, CLASSES, seen, CLASSES, {}, "test", "", fingerprint="pictures")


TEACHER = Teacher(
    name="small-student", head="none", margin=0.2, images_per_class=4,
    optim=Optim(method="adam", lr=1e-3, batch=16, epochs=4, schedule="step", warmup=0.0),
)  # fmt: skip


@pytest.fixture
def config(make_config, tmp_path: Path) -> Config:
    own = dict(data=DATA, teacher=TEACHER, cache=str(tmp_path / "cache"), log_every=1)
    return make_config(checkpoint_seconds=0.0, **own)


def get(config: Config, data: DataSet | None = None, passes: int = 0) -> FrozenTeacher:
    run, data = Run.start("crrcd", config), data or of(images())
    loader = Loader(data.train, config.data, 12, seed=0, device=run.device, rank=run.rank,
                    world=run.world)  # fmt: skip
    return teacher.get(run, config.teacher, config.data, data, loader=loader, passes=passes)


def folder(config: Config) -> Path:
    (found,) = Path(config.cache).glob("teachers/small-student-*")
    return found


def lines(where: Path) -> list[dict]:
    return [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]


# -- triplets ------------------------------------------------------------------------------------


def test_a_teacher_without_classes_learns_from_triplets(config: Config) -> None:
    more = replace(TEACHER, optim=replace(TEACHER.optim, epochs=12, lr=5e-3))
    frozen = get(replace(config, teacher=more))
    losses = [line["loss"] for line in lines(folder(config))]
    assert len(losses) == 12 * 3 and sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert all(line["penalty"] == 0 for line in lines(folder(config)))
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.recogniser.training


def test_its_first_step_is_batch_hard_on_p_classes_of_k_images(config: Config) -> None:
    """The first loss, over unit embeddings of a fresh network, as plain loops over the batch."""
    get(config)
    run = Run.start("crrcd", config)
    torch.manual_seed(config.seed)
    fresh = run.place(Recogniser(TEACHER, 16, CLASSES)).train()
    data = images()
    sampler = PKSampler(data.labels, 4, 4, seed=config.seed)
    loader = Loader(data, DATA, 16, seed=config.seed, device=run.device, sampler=sampler)
    batch = next(loader.epoch(0))
    assert sorted(batch.y.bincount(minlength=CLASSES).tolist()) == [0, 0, 4, 4, 4, 4]
    e = F.normalize(fresh(batch.x_h()).detach().double(), dim=1)
    total = 0.0
    for i in range(16):
        d = [(e[i] - e[j]).norm().item() for j in range(16)]
        far = max(d[j] for j in range(16) if j != i and batch.y[j] == batch.y[i])
        near = min(d[j] for j in range(16) if batch.y[j] != batch.y[i])
        total += max(0.0, far - near + TEACHER.margin) / 16
    assert lines(folder(config))[0]["loss"] == pytest.approx(total, rel=1e-4)


KILLED = """
import json, os, signal, sys
from crrcd.config import Config
from shared.config import from_dict
from shared.phase import Phase
from tests.shared import test_teacher as t
log = Phase.log
def noted(self, batch, **terms):
    if self.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return log(self, batch, **terms)
Phase.log = noted
t.get(from_dict(Config, json.loads(sys.argv[1])))
"""


def test_its_training_goes_on_bit_for_bit_after_kill_9(config: Config, tmp_path: Path) -> None:
    whole = replace(config, cache=str(tmp_path / "whole"))
    get(whole)
    done = forked("-c", KILLED, json.dumps(to_dict(config)))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder(config) / "teacher.safetensors").exists()
    get(config)
    assert lines(folder(config)) == lines(folder(whole))
    one, other = (load_file(folder(c) / "teacher.safetensors") for c in (config, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


RANKED = """
import json, sys
import torch
from crrcd.config import Config
from shared.config import from_dict
from tests.shared import test_teacher as t
torch.nn.modules.batchnorm._BatchNorm.train = (
    lambda self, mode=True: torch.nn.Module.train(self, False))
t.get(from_dict(Config, json.loads(sys.argv[1])))
"""


def test_two_gloo_ranks_train_it_as_one_does(config: Config, tmp_path: Path) -> None:
    """Batch norm frozen: losses and the norm of the gradient at every step, and the weights.

    One rank alone has two classes of four in its half of the batch, so that its hardest negative is
    another: the loss is over the global batch.
    """
    optim = Optim(method="sgd", lr=1e-2, momentum=0.0, nesterov=False, batch=16, epochs=2)
    config = replace(config, teacher=replace(TEACHER, optim=optim))
    found = []
    for number in (1, 2):
        one = replace(config, cache=str(tmp_path / f"cache-{number}"),
                      folder=str(tmp_path / f"run-{number}"))  # fmt: skip
        for done in ranks(number, "-c", RANKED, json.dumps(to_dict(one))):
            assert done.returncode == 0, done.stderr[-3000:]
        found.append(folder(one))
    first, second = map(lines, found)
    assert len(first) == len(second) == 6 and first[0]["loss"] > 0
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)
    one, two = (load_file(where / "teacher.safetensors") for where in found)
    start = Recogniser(TEACHER, 16, CLASSES)
    torch.manual_seed(config.seed)
    start = Recogniser(TEACHER, 16, CLASSES)
    for name, before in start.state_dict().items():
        moved = (one[name] - before).float().norm()
        assert (one[name] - two[name]).float().norm() <= 1e-3 * moved + 1e-7, name


@pytest.mark.parametrize("k", [1, 3])
def test_images_per_class_that_do_not_divide_the_batch_are_refused(config: Config, k: int) -> None:
    wrong = replace(config, teacher=replace(TEACHER, images_per_class=k))
    line = f"^--teacher.images-per-class {k}: must be 2 or more and divide --teacher.optim.batch 16"
    with pytest.raises(ValueError, match=line):
        get(wrong)


def test_objects_are_told_apart_by_classes(config: Config) -> None:
    with pytest.raises(ValueError, match="--teacher.head none: .* is scored by classes"):
        get(config, replace(of(images()), task="objects"))


# -- its outputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_kept_embeddings_are_live_ones_and_logits_are_empty(
    config: Config, precision: str
) -> None:
    config = replace(config, precision=precision)
    frozen = get(config, passes=100)
    assert frozen.cache is not None and frozen.cache.ready and frozen.classes == 0
    assert not (frozen.cache.folder / "logits").exists()
    run = frozen.cache.run
    about = json.loads((run.folder / "config.json").read_text())["teacher_outputs"]
    assert about["logits"] == "none"
    for batch in frozen.cache.loader.epoch(0):
        with run.autocast():
            e_t, z_t = frozen.targets(batch)
            e, z = frozen(batch.x_h())
        assert z_t.shape == z.shape == (12, 0) and z_t.dtype == z.dtype == torch.float32
        assert torch.equal(e_t, e) and e_t.dtype == torch.float32
        assert torch.equal(frozen.output(batch.x_h(), "faces"), frozen(batch.x_h())[0])
    assert frozen.embeddings().shape == (CLASSES * EACH, 128)


def test_maps_are_those_of_the_bare_backbone_without_gradient(config: Config) -> None:
    frozen = get(config, passes=100)
    assert frozen.cache is not None
    batch = next(frozen.cache.loader.epoch(0))
    e_t, maps = frozen.maps(batch)
    e, expected = frozen.recogniser.backbone(batch.x_h())
    assert torch.equal(e_t, e) and list(maps) == list(expected)
    assert all(torch.equal(maps[k], expected[k]) and not maps[k].requires_grad for k in maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen.maps(batch)[0].dtype == torch.float32


def test_a_file_of_another_head_gives_its_backbone(config: Config, tmp_path: Path) -> None:
    """--teacher.checkpoint: without classes there is no head to fit."""
    source = Recogniser(Network("small-student", head="cosface"), 16, 4)
    save(source, tmp_path / "own.safetensors")
    own = replace(TEACHER, checkpoint=str(tmp_path / "own.safetensors"))
    found = get(replace(config, teacher=own)).recogniser
    ours, theirs = found.state_dict(), source.state_dict()
    assert ours.keys() == theirs.keys() - {"head.weight"}
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert not list(Path(config.cache).glob("teachers/*/teacher.safetensors"))


def test_any_trained_network_teaches_with_kept_outputs_of_its_own(config: Config) -> None:
    data, first = of(images()), get(config, passes=100)
    assert first.cache is not None
    run, loader = first.cache.run, first.cache.loader
    torch.manual_seed(5)
    assistant = run.place(Recogniser(Network("small-assistant", head="arcface"), 16, CLASSES))
    made_by = Teacher(name="small-assistant", head="arcface")
    frozen = teacher.of(run, assistant, made_by, data, loader=loader, passes=100)
    assert frozen.cache is not None and frozen.cache.ready and not assistant.training
    assert frozen.cache.folder.name.startswith("small-assistant-")
    for batch in loader.epoch(0):
        for taught_by in (first, frozen):
            for kept, live in zip(taught_by.targets(batch), taught_by(batch.x_h()), strict=True):
                assert torch.equal(kept, live)
    assert frozen.targets(batch)[1].shape == (12, CLASSES)
    assert teacher.of(run, assistant, made_by, data).cache is None


# -- weights to start from -----------------------------------------------------------------------


def trunk(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    state = Recogniser(TEACHER, 16, CLASSES).backbone.state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith(("linear.", "bn."))}, path)
    return path


def test_a_teacher_starts_from_weights_and_is_known_by_their_content(
    config: Config, tmp_path: Path, capsys
) -> None:
    still = replace(TEACHER, optim=replace(TEACHER.optim, epochs=1, lr=0.0))
    path = trunk(tmp_path / "a.pth", 1)
    c = replace(config, teacher=replace(still, weights=str(path)))
    found = get(c).recogniser.backbone.state_dict()
    expected = torch.load(path)
    learnt = [k for k, v in expected.items() if "running" not in k and "num_batches" not in k]
    assert all(torch.equal(found[k], expected[k]) for k in learnt)
    assert "a.pth (state dict; not in it and kept: 6 of the network" in capsys.readouterr().err
    where = folder(c)
    path.rename(tmp_path / "b.pth")  # elsewhere: the same teacher
    c = replace(config, teacher=replace(still, weights=str(tmp_path / "b.pth")))
    get(c)
    assert folder(c) == where
    trunk(tmp_path / "b.pth", 2)  # other content under the same name
    get(c)
    assert len(list(Path(c.cache).glob("teachers/*"))) == 2


def test_weights_and_a_checkpoint_are_one_too_many(config: Config, tmp_path: Path) -> None:
    both = replace(TEACHER, weights="imagenet", checkpoint=str(tmp_path / "a.pth"))
    with pytest.raises(ValueError, match="^--teacher.checkpoint and --teacher.weights: "):
        get(replace(config, teacher=both))


def test_weights_that_are_not_there_are_named(config: Config, tmp_path: Path) -> None:
    gone = replace(TEACHER, weights=str(tmp_path / "gone.pth"))
    with pytest.raises(ValueError, match="^--teacher.weights .*gone.pth: no such file"):
        get(replace(config, teacher=gone))


def test_a_part_of_the_images_makes_another_teacher(config: Config) -> None:
    whole, run = images(), Run.start("crrcd", config)
    halves = [of(Part(whole, torch.arange(k, len(whole), 2))) for k in (0, 1)]
    assert torch.equal(halves[0].train.labels, halves[1].train.labels)
    named = {teacher._folder(run, TEACHER, DATA, data) for data in halves}
    loaders = [Loader(data.train, DATA, 12, seed=0, device=run.device) for data in halves]
    own = run.place(Recogniser(TEACHER, 16, CLASSES))
    caches = [teacher.of(run, own, TEACHER, d, loader=x).cache
              for d, x in zip(halves, loaders, strict=True)]  # fmt: skip
    assert len(named) == 2 and len({c.folder for c in caches if c is not None}) == 2
