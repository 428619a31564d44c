"""BTNet's protocols: each column against pairs, searches and templates made one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from btnet.scoring import (
    STRATEGIES,
    column,
    embed_at,
    gains,
    mean,
    ranked,
    routed,
    settings,
    verified,
    watch_list,
)
from shared.data.pipeline import Resident
from shared.data.protocols import Evaluation, face_folders
from shared.degrade import downsample
from shared.evaluate.score import Score, opened, score

SIZES = (3, 6, 12, 24)
PEOPLE, EACH = 40, 5


def network(size: int, seed: int = 0):
    """Images seen at `size` px; networks of two sizes have somewhat different weights, and the
    outputs of larger ones are longer."""
    weight = torch.randn(7, 3 * 24 * 24, generator=torch.Generator().manual_seed(seed))
    weight = weight + 0.1 * torch.randn(
        7, 3 * 24 * 24, generator=torch.Generator().manual_seed(100 + size)
    )

    def embedded(pixels: Tensor) -> Tensor:
        x = downsample(pixels.float() / 255, size, mode="bilinear")
        return torch.nn.functional.interpolate(x, (24, 24)).flatten(1) @ weight.T * size**0.5

    return embedded


@pytest.fixture(scope="module")
def faces() -> Evaluation:
    """People who differ in a coarse pattern, images of one in noise."""
    random = np.random.default_rng(0)
    people = random.integers(0, 256, (PEOPLE, 3, 4, 4)).repeat(6, -1).repeat(6, -2)
    pixels = people.repeat(EACH, 0) * 0.5 + random.integers(0, 128, (PEOPLE * EACH, 3, 24, 24))
    return face_folders("some", Resident(pixels.astype(np.uint8), np.repeat(range(PEOPLE), EACH)))


@pytest.fixture(scope="module")
def embedded(faces: Evaluation) -> dict[int, tuple[Tensor, Tensor]]:
    return embed_at({r: network(r) for r in SIZES}, faces)


def alone(faces: Evaluation, size: int, number: int) -> np.ndarray:
    """e(x) + e(flip x) of one image, in float64."""
    pixels = faces.images.pixels[number][None]  # type: ignore[attr-defined]
    net = network(size)
    return (net(pixels) + net(pixels.flip(-1)))[0].double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(a * b) / (sum(a * a) * sum(b * b)) ** 0.5)


# -- the settings --------------------------------------------------------------------------------


def test_settings_are_the_columns_of_table1() -> None:
    shown = [column(s) for s in settings((28, 112, 7, 14))]
    assert shown == ["112&7", "112&14", "112&28", "7&7", "14&14", "28&28", "112&112"]


# -- verification --------------------------------------------------------------------------------


def test_each_side_of_a_pair_is_seen_at_its_own_resolution(faces, embedded) -> None:
    for setting in [(24, 6), (24, 3), (6, 6)]:
        found = verified(embedded, faces, column(setting))
        first, second, _ = faces.pairs
        for p in range(0, len(first), 23):
            a = alone(faces, setting[0], int(first[p]))
            b = alone(faces, setting[1], int(second[p]))
            assert found.extra["scores"][p] == pytest.approx(cosine(a, b), abs=1e-5)


def test_accuracy_takes_each_folds_threshold_from_the_other_nine(faces, embedded) -> None:
    found = verified(embedded, faces, "24&6")
    scores, same = found.extra["scores"], faces.pairs[2].numpy()
    fold = np.arange(len(same)) // (len(same) // 10)
    right = np.empty(len(same), dtype=bool)
    for f in range(10):
        train = fold != f
        tried = [2.0, *scores[train]]
        best = max(tried, key=lambda t: (((scores >= t) == same)[train].sum(), t))
        below = max([s for s in scores[train] if s < best], default=-2.0)
        right[fold == f] = ((scores >= (best + below) / 2) == same)[fold == f]
    assert np.array_equal(found.correct["24&6"], right)
    assert found.metrics["24&6"] == pytest.approx(100 * right.mean())
    assert 55 < found.metrics["24&6"] < 99  # neither chance nor everything


def test_every_setting_is_a_column_in_order_with_an_interval_by_identity(faces, embedded) -> None:
    found = verified(embedded, faces, "24&6")
    names = [column(s) for s in settings(SIZES)]
    assert list(found.columns.items()) == [(n, n) for n in names] and list(found.metrics) == names
    labels = faces.images.labels.numpy()
    for name in names:
        assert np.array_equal(found.groups[name], labels[faces.pairs[0]])
        interval = found.interval(name)
        assert interval.low <= interval.mean == found.metrics[name] <= interval.high
    assert found.headline == "24&6" and found.unit == "identities"


def test_same_resolution_columns_are_the_ordinary_score_of_that_network(faces, embedded) -> None:
    columns, ranks = verified(embedded, faces, "24&6"), ranked(embedded, faces, "24&6")
    for r in SIZES:
        usual = score(network(r), faces)
        assert columns.metrics[f"{r}&{r}"] == usual.metrics["verification"]
        assert np.array_equal(columns.correct[f"{r}&{r}"], usual.correct["verification"])
        assert np.array_equal(ranks.correct[f"{r}&{r}"], usual.correct["rank1"])


def test_pairs_of_nobody_are_resampled_as_pairs(faces) -> None:
    images = Resident(faces.images.pixels, np.zeros(len(faces.images)))
    nameless = replace(faces, images=images)
    found = verified(embed_at({r: network(r) for r in (6, 24)}, nameless), nameless, "24&6")
    assert found.unit == "pairs" and len(set(found.groups["24&6"])) == len(faces.pairs[0])


def test_without_mirror_images_an_embedding_is_that_of_the_image(faces) -> None:
    plain = replace(faces, mirror=False)
    found = verified(embed_at({r: network(r) for r in (6, 24)}, plain), plain, "24&6")
    pixels = faces.images.pixels
    a, b = network(24)(pixels[faces.pairs[0][:1]])[0], network(6)(pixels[faces.pairs[1][:1]])[0]
    assert found.extra["scores"][0] == pytest.approx(
        cosine(a.double().numpy(), b.double().numpy()), abs=1e-5
    )


def test_an_unknown_headline_and_an_evaluation_without_pairs_are_refused(faces, embedded) -> None:
    with pytest.raises(ValueError, match="no column '24&5'; there are: 24&3, 24&6"):
        verified(embedded, faces, "24&5")
    with pytest.raises(ValueError, match="some: no pairs"):
        verified(embedded, replace(faces, pairs=None), "24&6")


# -- identification and templates ----------------------------------------------------------------


def test_rank1_compares_probes_at_one_resolution_with_a_gallery_at_another(faces, embedded) -> None:
    found = ranked(embedded, faces, "24&3")
    labels = faces.images.labels
    gallery = {int(g): alone(faces, 24, int(g)) for g in faces.gallery}
    for setting in [(24, 3), (24, 6)]:
        for k, probe in enumerate(faces.probes[:40].tolist()):
            e = alone(faces, setting[1], probe)
            best = max(gallery, key=lambda g: cosine(e, gallery[g]))
            right = bool(labels[best] == labels[probe])
            assert found.correct[column(setting)][k] == right
    assert 0 < found.metrics["24&3"] < 100 and found.headline == "24&3"


def test_a_template_sums_the_images_of_an_identity_at_all_resolutions_in_turn(
    faces, embedded
) -> None:
    found = ranked(embedded, faces, "24&6")
    labels = faces.images.labels.tolist()
    gallery = {int(g): alone(faces, 24, int(g)) for g in faces.gallery}
    right = []
    for who in sorted({labels[p] for p in faces.probes.tolist()}):
        mine = [p for p in faces.probes.tolist() if labels[p] == who]
        assert len(mine) == EACH - 1  # 3, 6, 12 and 24 px
        template = sum(alone(faces, SIZES[k % 4], p) for k, p in enumerate(mine))
        best = max(gallery, key=lambda g: cosine(template, gallery[g]))
        right.append(labels[best] == who)
    assert found.correct["templates"].tolist() == right
    assert found.groups["templates"].tolist() == sorted(set(labels))
    assert found.metrics["templates"] == pytest.approx(100 * np.mean(right))
    assert found.metrics["templates"] > found.metrics["24&3"]  # four images against one of 3 px


def test_without_a_gallery_there_is_no_rank1(faces, embedded) -> None:
    assert ranked(embedded, replace(faces, gallery=None, probes=None), "24&6") is None


# -- gains and means -----------------------------------------------------------------------------

# Table 1, accuracy.
TABLE1 = {
    "hr": (57.75, 81.02, 95.90, 60.70, 73.88, 93.58, 97.68),
    "mm": (50.58, 49.90, 50.03, 62.57, 78.00, 94.68, 97.68),
    "mr": (65.85, 87.47, 96.05, 61.02, 80.32, 95.12, 97.25),
    "bt": (86.10, 94.08, 96.65, 77.78, 90.90, 96.27, 97.25),
}
NAMES = ("112&7", "112&14", "112&28", "7&7", "14&14", "28&28", "112&112")
# Its gains; at 112&112 phi_mm is phi_hr, and none is printed.
GAINS = {
    "mm": (-0.89, -4.82, -305.80, 1.00, 1.00, 1.00),
    "mr": (1.00, 1.00, 1.00, 0.17, 1.56, 1.40),
    "bt": (3.50, 2.02, 5.00, 9.13, 4.13, 2.45),
}


def test_the_gains_of_table1_come_out_of_its_accuracies() -> None:
    values = {model: dict(zip(NAMES, row, strict=True)) for model, row in TABLE1.items()}
    found = gains(values)
    assert list(found) == list(GAINS)
    for model, row in GAINS.items():
        assert list(found[model]) == list(NAMES[:6])
        assert list(found[model].values()) == pytest.approx(row, abs=0.006)


def test_a_gain_without_its_baselines_is_left_out() -> None:
    values = {"hr": {"9&9": 50.0, "9&3": 50.0}, "mr": {"9&3": 60.0}, "bt": {"9&9": 70.0, "9&3": 80}}
    assert gains(values) == {"mr": {"9&3": 1.0}, "bt": {"9&3": 3.0}}  # no mm
    assert gains({"bt": {"9&9": 1.0, "templates": 2.0}}) == {"bt": {}}


def test_columns_are_averaged_over_test_sets() -> None:
    assert mean([{"9&3": 50.0, "3&3": 1.0}, {"3&3": 4.0, "9&3": 60.0}]) == {"9&3": 55.0, "3&3": 2.5}
    for bad in ([], [{"9&3": 50.0}, {"9&3": 1.0, "3&3": 1.0}]):
        with pytest.raises(ValueError, match="same columns"):
            mean(bad)


# -- watch lists ---------------------------------------------------------------------------------

RESOLUTIONS = (7, 14, 28)


class Native:
    """Faces of native sizes, and what they were asked for."""

    def __init__(self) -> None:
        random = np.random.default_rng(3)
        people = random.integers(0, 256, (60, 3, 3, 3))
        who = [*range(20)] * 4 + [*range(20, 60)]  # 20 people, 40 strangers
        self.images = []
        for k in who:
            h, w = random.integers(5, 40, 2)
            rows, columns = np.arange(h) * 3 // h, np.arange(w) * 3 // w
            image = people[k][:, rows][:, :, columns] * 0.3 + random.integers(0, 178, (3, h, w))
            self.images.append(torch.from_numpy(image.astype(np.uint8)))
        self.ids = np.array([k if k < 20 else -1 for k in who])
        self.roles = np.array(["gallery"] * 40 + ["mated"] * 40 + ["unmated"] * 40)
        self.weight = {
            r: torch.randn(6, 27, generator=torch.Generator().manual_seed(r)) * 0.3
            + torch.randn(6, 27, generator=torch.Generator().manual_seed(0))
            for r in RESOLUTIONS
        }
        self.calls: list[tuple[int, int]] = []  # (number of the image, resolution)

    def one(self, image: Tensor, r: int) -> Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(image.float() / 255 - 0.5, 3)
        return self.weight[r] @ x.flatten()

    def __call__(self, images: list[Tensor], r: int) -> Tensor:
        for image in images:
            same = [k for k, own in enumerate(self.images) if torch.equal(own, image)]
            self.calls += [(k, r) for k in same]
        return torch.stack([self.one(image, r) for image in images])


@pytest.fixture(scope="module")
def native() -> Native:
    return Native()


@pytest.fixture(scope="module")
def found(native: Native) -> dict[str, Score]:
    return watch_list(native, native.images, native.ids, native.roles, RESOLUTIONS)


def test_the_nine_strategies_are_those_of_table2_in_its_order() -> None:
    assert list(STRATEGIES) == [
        "avg+floor", "avg+near", "avg+ceil", "min+floor", "min+near", "min+ceil",
        "max+floor", "max+near", "max+ceil",
    ]  # fmt: skip
    assert STRATEGIES["max+ceil"] == ("max", "ceil")


def way(native: Native, name: str) -> list[int]:
    """Each image's resolution, by the words of the strategy."""
    chosen = []
    for image in native.images:
        h, w = image.shape[1:]
        side = {"avg": (h + w) // 2, "min": min(h, w), "max": max(h, w)}[name.split("+")[0]]
        if name.endswith("floor"):
            chosen.append(28 if side >= 28 else 14 if side >= 14 else 7)
        elif name.endswith("ceil"):
            chosen.append(7 if side <= 7 else 14 if side <= 14 else 28)
        else:
            chosen.append(7 if side <= 10 else 14 if side <= 21 else 28)
    return chosen


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_open_set_search_of_a_strategy_is_a_plain_search(native, found, name: str) -> None:
    """Each image through the resolution it is sent to; prototypes of raw means; thresholds by
    trying every unmated maximum."""
    both = [
        (native.one(image, r) + native.one(image.flip(-1), r)).double().numpy()
        for image, r in zip(native.images, way(native, name), strict=True)
    ]
    gallery = {
        i: sum(both[k] for k in np.flatnonzero((native.ids == i) & (native.roles == "gallery"))) / 2
        for i in range(20)
    }
    maxima = [
        max(cosine(both[k], g) for g in gallery.values())
        for k in np.flatnonzero(native.roles == "unmated")
    ]
    mated = np.flatnonzero(native.roles == "mated")
    mates = np.array([cosine(both[k], gallery[native.ids[k]]) for k in mated])  # 20 people: rank 20
    result = found[name]
    assert list(result.columns.values()) == [f"TPIR20 at FPIR .{k}" for k in (3, 2, 1)]
    assert np.array_equal(native.ids[mated], result.groups["tpir20_at_fpir_0.1"])
    for fpir in (0.3, 0.2, 0.1):
        kept_out = sorted(maxima, reverse=True)[round(fpir * 40)]
        column = f"tpir20_at_fpir_{fpir:g}"
        assert np.array_equal(result.correct[column], mates > kept_out)
        assert result.metrics[column] == pytest.approx(100 * (mates > kept_out).mean())
    first = [max(gallery, key=lambda i: cosine(both[k], gallery[i])) for k in mated]
    assert result.metrics["rank1"] == pytest.approx(100 * (native.ids[mated] == first).mean())
    area = np.mean([(mates > m).mean() for m in maxima])
    assert result.metrics["tpir20_fpir_auc"] == pytest.approx(100 * area)


def test_each_image_is_embedded_once_for_each_resolution_that_needs_it(native) -> None:
    native.calls = []
    watch_list(native, native.images, native.ids, native.roles, RESOLUTIONS)
    needed = {(k, r) for name in STRATEGIES for k, r in enumerate(way(native, name))}
    assert sorted(native.calls) == sorted(needed)


def test_every_image_is_counted_at_the_resolution_it_goes_to(native) -> None:
    counts = routed(native.images, RESOLUTIONS)
    for name in STRATEGIES:
        chosen = way(native, name)
        assert counts[name] == {r: chosen.count(r) for r in RESOLUTIONS}


def test_an_unknown_strategy_is_refused_before_anything_is_embedded(native) -> None:
    native.calls = []
    with pytest.raises(ValueError, match="no strategy 'max'; there are: avg.floor, "):
        watch_list(native, native.images, native.ids, native.roles, RESOLUTIONS, ("max",))
    assert not native.calls


def test_alarms_that_too_few_strangers_can_show_are_no_columns(native) -> None:
    e = torch.randn(9 + 40, 4)
    metrics, correct = opened(
        e[9:29], np.arange(20), e[:9], e[29:], np.arange(20), alarms=(0.3, 0.1)
    )
    assert list(correct) == ["tpir20_at_fpir_0.3", "rank1"]
    assert np.isnan(metrics["tpir20_at_fpir_0.1"])
