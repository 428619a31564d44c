"""Kept outputs of a teacher are those of a live forward pass, and only where nothing differs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crrcd.config import Config
from crrcd.train import train
from shared import teacher
from shared.config import Data, Network, Teacher, to_dict
from shared.data.pipeline import Batch, Loader, Resident, Streaming, Views, normalise
from shared.data.samplers import PKSampler
from shared.data.sets import DataSet
from shared.models.recogniser import Recogniser, save
from shared.run import Run
from shared.teacher import FrozenTeacher
from tests.forked import forked, ranks

DATA = Data(hr=32, lr=8, shift=4, shift_step=4)
VIEWS, COUNT, BATCH = 18, 64, 24  # the last part of a view has 16 images
PART = 72  # images that a view costs, in whole batches


def photo(number: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, DATA.hr, DATA.hr), generator=g, dtype=torch.uint8)


IMAGES = Resident(torch.stack([photo(k) for k in range(COUNT)]), torch.arange(COUNT) % 8)


def of(images: Resident | Streaming, **changes: object) -> DataSet:
    known = DataSet("faces", images, 8, images, 8, {}, "test", "", fingerprint="photos")
    return replace(known, **changes)  # type: ignore[arg-type]


@pytest.fixture
def config(make_config, tmp_path: Path) -> Config:
    c = make_config()
    return replace(c, data=DATA, optim=replace(c.optim, batch=BATCH), cache=str(tmp_path / "cache"))


def weights(network: Network, path: Path, size: int = DATA.hr, seed: int = 3) -> Path:
    """Of a random network whose batch norm has something to do."""
    torch.manual_seed(seed)
    recogniser = Recogniser(network, size, 8)
    for module in recogniser.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    save(recogniser, path)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights(Teacher(), tmp_path_factory.mktemp("own") / "own.safetensors")


class Asked(FrozenTeacher):
    """Counts the images that it was shown."""

    images = 0

    def forward(self, x_h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Asked.images += len(x_h)
        return super().forward(x_h)


def get(
    config: Config, own: Path, passes: int = 100, data: DataSet | None = None, **changes: object
) -> tuple[Run, Loader, FrozenTeacher]:
    config = replace(config, teacher=replace(config.teacher, checkpoint=str(own), **changes))
    run, data = Run.start("crrcd", config), of(IMAGES) if data is None else data
    loader = Loader(data.train, config.data, config.optim.batch, seed=config.seed,
                    device=run.device, rank=run.rank, world=run.world)  # fmt: skip
    Asked.images = 0
    found = teacher.get(run, config.teacher, config.data, data, loader=loader, passes=passes)
    return run, loader, found


@pytest.fixture(autouse=True)
def _counted(monkeypatch) -> None:
    monkeypatch.setattr(teacher, "FrozenTeacher", Asked)


def epochs(loader: Loader, count: int = 3) -> Iterator[Batch]:
    for epoch in range(count):
        yield from loader.epoch(epoch)


def assert_live(run: Run, loader: Loader, frozen: FrozenTeacher, count: int = 3) -> None:
    """Kept and live targets of some epochs: the same bits, and nothing asked of the teacher."""
    assert frozen.cache is not None and frozen.cache.ready
    for batch in epochs(loader, count):
        before = Asked.images
        with run.autocast():
            e_t, z_t = frozen.targets(batch)
            assert Asked.images == before
            live = frozen(batch.x_h())
        assert e_t.dtype == z_t.dtype == torch.float32
        assert torch.equal(e_t, live[0]) and torch.equal(z_t, live[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_kept_targets_are_live_ones_bit_for_bit(
    config: Config, own: Path, precision: str, threads: int
) -> None:
    run, loader, frozen = get(replace(config, precision=precision, threads=threads), own)
    assert Asked.images == VIEWS * PART
    assert frozen.cache is not None and frozen.cache.z in frozen.cache.kept
    assert frozen.cache.e.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert_live(run, loader, frozen)
    again = get(replace(config, precision=precision, threads=threads), own)
    assert Asked.images == 0
    assert_live(*again)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_where_logits_do_not_fit_the_head_makes_the_same_bits(
    config: Config, own: Path, precision: str
) -> None:
    config = replace(config, precision=precision)
    dim = get(config, own, 0)[2].dim
    size = COUNT * VIEWS * dim * (2 if precision == "bf16" else 4) / 2**30  # not a byte more
    run, loader, frozen = get(config, own, outputs_gib=size)
    assert frozen.cache is not None and frozen.cache.kept == [frozen.cache.e]
    assert not (frozen.cache.folder / "logits").exists()
    assert "by the head" in json.loads((run.folder / "config.json").read_text())[
        "teacher_outputs"
    ]["logits"]  # fmt: skip
    assert_live(run, loader, frozen)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("head", ["arcface", "softmax"])
def test_an_iresnet_and_its_own_classifier_are_kept_bit_for_bit(
    config: Config, tmp_path: Path, precision: str, head: str
) -> None:
    name = "iresnet18" if head == "arcface" else "resnet8x4"
    c = replace(config, precision=precision, data=replace(DATA, shift=0),
                teacher=replace(config.teacher, name=name, head=head))  # fmt: skip
    data = of(Resident(IMAGES.pixels[:30], IMAGES.labels[:30]))
    assert_live(*get(c, weights(c.teacher, tmp_path / "own.safetensors"), data=data))


def test_p_x_k_batches_are_served_too(config: Config, own: Path) -> None:
    run, loader, frozen = get(config, own)
    sampler = PKSampler(loader.images.labels, 6, 4, seed=0)
    loader = Loader(loader.images, config.data, 24, seed=0, device=run.device, sampler=sampler)
    assert_live(run, loader, frozen)


def test_embeddings_are_those_of_the_images_as_they_are(config: Config, own: Path) -> None:
    _, loader, frozen = get(config, own, passes=VIEWS - 1)
    assert frozen.cache is not None and not frozen.cache.ready and Asked.images == 0
    found = frozen.embeddings()
    assert Asked.images == PART and found.shape == (COUNT, frozen.dim) and not found.flags.writeable
    assert isinstance(loader.images, Resident)
    for first in (0, 24, 40):  # three whole batches, the last one at another place
        x = normalise(loader.images.pixels[first : first + 24], config.data)
        assert np.array_equal(found[first : first + 24], frozen(x)[0].numpy())
    Asked.images = 0
    assert np.array_equal(get(config, own, passes=0)[2].embeddings(), found)
    assert Asked.images == 0
    # logits were not kept with them: they are, now
    assert_live(*get(config, own))
    assert np.array_equal(get(config, own)[2].embeddings(), found)


def test_embeddings_are_widened_exactly(config: Config, own: Path) -> None:
    run, loader, frozen = get(replace(config, precision="bf16"), own, passes=0)
    assert isinstance(loader.images, Resident)
    with run.autocast():
        live = frozen(normalise(loader.images.pixels[8:32], config.data))[0]
    assert np.array_equal(frozen.embeddings()[8:32], live.numpy())


def test_a_teacher_without_a_loader_has_no_embeddings(config: Config, own: Path) -> None:
    run, _, _ = get(config, own)
    c = replace(config.teacher, checkpoint=str(own))
    with pytest.raises(ValueError, match="was given no loader"):
        teacher.get(run, c, config.data, of(IMAGES)).embeddings()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_run_has_the_bits_of_one_with_a_live_teacher(make_config, precision: str) -> None:
    found = []
    for outputs in ("never", "always", "always"):  # computed, then from disk
        c = make_config(precision=precision, seed=11)
        run = train(replace(c, teacher=replace(c.teacher, outputs=outputs)))
        weights = load_file(run / "student.safetensors")
        lines = (run / "metrics.jsonl").read_text()
        found.append((lines, {k: v.numpy().tobytes() for k, v in weights.items()}))
        record = json.loads((run / "config.json").read_text())["teacher_outputs"]
        assert record == "live" if outputs == "never" else record["views"] == VIEWS
    assert found[0] == found[1] == found[2]


# -- when ----------------------------------------------------------------------------------------


def test_auto_keeps_where_the_views_are_no_more_than_the_passes(
    config: Config, own: Path
) -> None:
    run, _, frozen = get(config, own, passes=VIEWS - 1)
    assert frozen.cache is not None and not frozen.cache.ready
    assert json.loads((run.folder / "config.json").read_text())["teacher_outputs"] == "live"
    run, loader, frozen = get(config, own, passes=VIEWS)
    assert_live(run, loader, frozen)
    assert_live(*get(config, own, passes=1))  # they are there


def test_never_and_a_run_that_teaches_nobody_ask_nothing(config: Config, own: Path) -> None:
    for changes in ({"outputs": "never"}, {"outputs": "always", "passes": 0}):
        run, loader, frozen = get(config, own, **changes)  # type: ignore[arg-type]
        assert Asked.images == 0 and frozen.cache is not None and not frozen.cache.ready
        batch = next(loader.epoch(0))
        assert torch.equal(frozen.targets(batch)[0], frozen(batch.x_h())[0])
    run, loader, frozen = get(config, own, passes=1, outputs="always")
    assert_live(run, loader, frozen)


def test_more_than_the_limit_is_computed_live_and_said_or_refused(
    config: Config, own: Path, capsys
) -> None:
    line = r"18 views of 64 images take 0\.00 GiB, --teacher\.outputs-gib allows 1e-05"
    with pytest.raises(ValueError, match=f"^--teacher.outputs always: {line}$"):
        get(config, own, outputs="always", outputs_gib=1e-5)
    _, loader, frozen = get(config, own, outputs_gib=1e-5)
    assert "teacher's outputs are computed at each step: 18 views" in capsys.readouterr().err
    assert frozen.cache is not None and not frozen.cache.ready
    with pytest.raises(ValueError, match="--teacher.outputs-gib -1"):
        Teacher(outputs_gib=-1)


def test_a_disk_without_room_is_left_alone(config: Config, own: Path, monkeypatch, capsys):
    import shutil

    usage = type(shutil.disk_usage("/"))(10**9, 10**9, 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    _, _, frozen = get(config, own)
    assert frozen.cache is not None and not frozen.cache.ready
    assert "has room for 0.00" in capsys.readouterr().err


# -- other views ---------------------------------------------------------------------------------


def larger(side: int) -> Resident:
    g = torch.Generator().manual_seed(side)
    pixels = torch.randint(0, 256, (COUNT, 3, side, side), generator=g, dtype=torch.uint8)
    return Resident(pixels, IMAGES.labels)


def test_crops_of_a_larger_picture_are_kept_bit_for_bit(config: Config, own: Path) -> None:
    c = replace(config, data=replace(DATA, pad="image"))
    run, loader, frozen = get(c, own, data=of(larger(c.data.kept)))
    assert c.data.kept == 40 and loader.views.count == VIEWS
    assert_live(run, loader, frozen)
    assert isinstance(loader.images, Resident)
    centre = normalise(loader.images.pixels[:24, :, 4:36, 4:36], c.data)
    assert np.array_equal(frozen.embeddings()[:24], frozen(centre)[0].numpy())


def test_random_crops_are_not_kept_but_centres_are(config: Config, own: Path, capsys) -> None:
    c = replace(config, data=replace(DATA, crop="resized"))
    data = of(larger(c.data.kept))
    line = "--data.crop resized draws other views in every epoch"
    with pytest.raises(ValueError, match=f"^--teacher.outputs always: {line}$"):
        get(c, own, data=data, outputs="always")
    _, loader, frozen = get(c, own, data=data)
    assert f"are computed at each step: {line}" in capsys.readouterr().err
    assert frozen.cache is not None and not frozen.cache.ready
    batch = next(loader.epoch(0))
    assert torch.equal(frozen.targets(batch)[0], frozen(batch.x_h())[0])
    assert isinstance(loader.images, Resident)
    centre = normalise(loader.images.pixels[:24, :, 2:34, 2:34], c.data)
    assert np.array_equal(frozen.embeddings()[:24], frozen(centre)[0].numpy())


# -- keys ----------------------------------------------------------------------------------------


def folder(config: Config, own: Path, data: DataSet | None = None) -> Path:
    cache = get(config, own, 0, data)[2].cache
    assert cache is not None
    return cache.folder


def test_what_decides_a_value_has_files_of_its_own(
    config: Config, own: Path, tmp_path: Path, monkeypatch
) -> None:
    c = config
    moved = Resident(IMAGES.pixels.roll(1, 0), IMAGES.labels)
    relabelled = Resident(IMAGES.pixels, IMAGES.labels.flip(0))
    found = [
        folder(c, own),
        folder(c, weights(Teacher(), tmp_path / "other.safetensors", seed=4)),
        folder(replace(c, precision="bf16"), own),
        folder(replace(c, threads=2), own),
        folder(replace(c, optim=replace(c.optim, batch=16)), own),
        folder(replace(c, data=replace(DATA, shift=2, shift_step=2)), own),
        folder(replace(c, data=replace(DATA, pad="zero")), own),
        folder(replace(c, data=replace(DATA, mean=(0.4, 0.5, 0.5))), own),
        folder(replace(c, data=replace(DATA, flip=False)), own),
        folder(replace(c, data=replace(DATA, quality="unlocalised")), own),
        folder(replace(c, data=replace(DATA, seed=1)), own),
        folder(replace(c, data=replace(DATA, root="elsewhere")), own),
        folder(c, own, of(IMAGES, fingerprint="others")),
        folder(c, own, of(moved)),
        folder(c, own, of(relabelled)),
        folder(replace(c, teacher=replace(c.teacher, scale=8.0)), own),
    ]
    torch.set_num_threads(1)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found.append(folder(c, own))
    assert len(set(found)) == len(found)


def test_what_decides_no_value_shares_them(config: Config, own: Path) -> None:
    c, first = config, folder(config, own)
    for other in (
        replace(c, seed=4),
        replace(c, data=replace(DATA, lr=4, kernel="area", antialias=False, workers=0)),
        replace(c, data=replace(DATA, quality="enlarged")),
        replace(c, optim=replace(c.optim, epochs=9)),
        replace(c, teacher=replace(c.teacher, outputs="always", outputs_gib=1.0)),
    ):
        assert folder(other, own) == first


def test_outputs_do_not_name_the_teacher(config: Config) -> None:
    run, data = Run.start("crrcd", config), of(IMAGES)
    one, two = config.teacher, replace(config.teacher, outputs="never", outputs_gib=1.0)
    named = [teacher._folder(run, c, config.data, data) for c in (one, two)]
    assert named[0] == named[1]


# -- damage, ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embeddings", "logits"])
def test_damage_is_noticed_and_computed_anew(
    config: Config, own: Path, name: str, capsys
) -> None:
    path = folder(config, own) / name
    get(config, own)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    run, loader, frozen = get(config, own)
    assert Asked.images == 24
    said = capsys.readouterr().err
    assert f"{path.parent}: 1 damaged parts of teacher's outputs are computed anew" in said
    assert_live(run, loader, frozen)


RANKED = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    import torch
    from crrcd.config import Config
    from shared.config import from_dict
    from tests.shared.data import test_teacher_cache as t
    t.teacher.FrozenTeacher = t.Asked
    config = from_dict(Config, json.loads(sys.argv[1]))
    run, loader, frozen = t.get(config, Path(sys.argv[2]))
    asked = t.Asked.images
    t.assert_live(run, loader, frozen)
    index = torch.cat([batch.index for batch in loader.epoch(0)])
    print(json.dumps([run.rank, asked, str(frozen.cache.folder), index.tolist()]))
    """
)


def test_two_ranks_share_the_work_and_agree_with_live(config: Config, own: Path) -> None:
    both = ranks(2, "-c", RANKED, json.dumps(to_dict(config)), str(own))
    assert [done.returncode for done in both] == [0, 0], both[0].stderr[-3000:]
    told = [json.loads(done.stdout.splitlines()[-1]) for done in both]
    found = {rank: (asked, folder, index) for rank, asked, folder, index in told}
    # 64 images in parts of 12: six parts, three for each rank
    assert [found[r][0] for r in (0, 1)] == [VIEWS * 36] * 2
    assert found[0][1] == found[1][1] and not set(found[0][2]) & set(found[1][2])


KILLED = textwrap.dedent(
    """
    import json, os, signal, sys
    from pathlib import Path
    from crrcd.config import Config
    from shared.config import from_dict
    from shared.data.kept import Rows
    from tests.shared.data import test_teacher_cache as t
    config, write, written = from_dict(Config, json.loads(sys.argv[1])), Rows.write, []
    def counted(self, *args):
        write(self, *args)
        written.append(args)
        if len(written) == 21:  # embeddings and logits of ten parts, and embeddings of the next
            os.kill(os.getpid(), signal.SIGKILL)
    Rows.write = counted
    t.get(config, Path(sys.argv[2]))
    """
)


def test_a_pass_that_is_killed_goes_on_and_gives_live_targets(
    config: Config, own: Path
) -> None:
    done = forked("-c", KILLED, json.dumps(to_dict(config)), str(own))
    assert done.returncode == -9, done.stderr
    run, loader, frozen = get(config, own)
    assert Asked.images == (VIEWS * 3 - 10) * 24
    assert_live(run, loader, frozen)


# -- images that are decoded from files ----------------------------------------------------------

class Decode:
    """Picklable; counts, and cannot decode some."""

    def __init__(self, bad: tuple[int, ...] = (), first: int = 0) -> None:
        self.bad, self.first, self.count = bad, first, 0

    def __call__(self, number: int) -> torch.Tensor:
        self.count += 1
        if number in self.bad:
            raise ValueError(f"/photos/{number}.jpg: not a readable image")
        return photo(self.first + number)


def streaming(decode: Decode, on_error: str = "stop") -> DataSet:
    return of(Streaming(decode, torch.arange(COUNT) % 8, workers=0, on_error=on_error))


def test_with_outputs_kept_a_step_decodes_nothing(config: Config, own: Path) -> None:
    decode = Decode()
    c, data = config, streaming(decode)
    _, live, _ = get(c, own, 0, data)
    expected = [(b.index, b.view, b.x_l(), b.x_h()) for b in epochs(live)]
    decode.count = 0
    run, loader, frozen = get(c, own, 100, data)
    assert decode.count == PART + 256  # once for the teacher, once for the LR views; whole parts
    decode.count = 0
    batches = list(epochs(loader))
    x_l = [(batch.x_l(), frozen.targets(batch)) for batch in batches]
    assert decode.count == 0
    for (index, view, low, high), batch, (found, _) in zip(expected, batches, x_l, strict=True):
        assert torch.equal(batch.index, index) and torch.equal(batch.view, view)
        assert torch.equal(found, low) and torch.equal(batch.x_h(), high)
    assert_live(run, loader, frozen)
    decode.count = 0
    get(c, own, 100, data)
    assert decode.count == 0
    other = replace(c, data=replace(c.data, kernel="area"))
    _, loader, frozen = get(other, own, 100, data)
    assert Asked.images == 0 and decode.count == 256  # LR views of its own, the same teacher's
    assert not torch.equal(next(loader.epoch(0)).x_l(), expected[0][2])


@pytest.mark.parametrize("quality", ["enlarged", "unlocalised"])
def test_kept_lr_views_are_what_the_student_sees(
    config: Config, own: Path, quality: Literal["enlarged", "unlocalised"]
) -> None:
    """Enlarged at each step; of the whole picture where the teacher sees its box."""
    c = replace(config, data=replace(DATA, quality=quality))
    data, whole = streaming(Decode()), None
    if quality == "unlocalised":
        whole, data = data.train, streaming(Decode(first=COUNT))

    def loaded() -> Loader:
        return Loader(data.train, c.data, BATCH, seed=0, device=torch.device("cpu"), whole=whole)

    expected = [batch.x_l() for batch in epochs(loaded())]
    run, loader = Run.start("crrcd", c), loaded()
    made_by = replace(c.teacher, checkpoint=str(own))
    frozen = teacher.get(run, made_by, c.data, data, loader=loader, passes=100)
    assert loader.kept_low is not None
    for batch, low in zip(epochs(loader), expected, strict=True):
        assert torch.equal(batch.x_l(), low)
    assert_live(run, loader, frozen, 1)


def test_lr_views_that_do_not_fit_are_made_at_each_step(config: Config, own: Path) -> None:
    decode = Decode()
    c, data = config, streaming(decode)
    size = COUNT * VIEWS * get(c, own, 0, data)[2].dim * 4 / 2**30
    run, loader, frozen = get(c, own, 100, data, outputs_gib=size)
    assert loader.kept_low is None
    assert_live(run, loader, frozen)
    realistic = replace(c, data=replace(c.data, degradation="realistic"))
    run, loader, frozen = get(realistic, own, 100, data)
    assert loader.kept_low is None and Asked.images == 0
    assert_live(run, loader, frozen)


def test_a_stand_in_has_the_outputs_of_the_image_that_is_used(config: Config, own: Path) -> None:
    bad = (3, 7, 41, 59)
    c, data = config, streaming(Decode(bad), "skip")
    run, loader, frozen = get(c, own, 100, data)
    assert loader.kept_low is None
    assert_live(run, loader, frozen)
    assert set(data.train.skipped) == set(bad)  # type: ignore[attr-defined]
    zeros = np.flatnonzero((frozen.embeddings() == 0).all(1))
    assert zeros.tolist() == list(bad)


def test_an_image_that_cannot_be_decoded_stops_the_pass_and_is_named(
    config: Config, own: Path
) -> None:
    c, data = config, streaming(Decode((41,)))
    with pytest.raises(ValueError, match=r"^/photos/41\.jpg: not a readable image$"):
        get(c, own, 100, data)


# -- the real recipe -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "flip"), [("bf16", True), ("fp32", False)])
def test_iresnet50_at_112_px_in_batches_of_96(
    config: Config, tmp_path: Path, precision: str, flip: bool
) -> None:
    """128 images: the cache's batches are 0..95 and 96..127 with 0..63, a live one is shuffled."""
    c = replace(
        config, precision=precision, optim=replace(config.optim, batch=96),
        data=replace(config.data, hr=112, shift=0, flip=flip),
        teacher=Teacher(name="iresnet50", head="arcface", scale=64.0, margin=0.5),
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (128, 3, 112, 112), generator=g, dtype=torch.uint8)
    data = of(Resident(pixels, torch.arange(128) % 8))
    run, loader, frozen = get(c, weights(c.teacher, tmp_path / "own.safetensors", 112), data=data)
    assert Asked.images == Views(c.data).count * 192
    assert_live(run, loader, frozen, count=1)
