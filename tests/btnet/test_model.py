"""BTNet's counts against the published ones, a branch against a plain functional forward pass, the
router against its definition written as a search, and mixed batches against single images."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from btnet.model import Branch, BTNet, aggregate, parts, select_branch, sides, trunk_map
from shared.config import Data
from shared.data.pipeline import normalise
from shared.degrade import low, to_float
from shared.models import build, count_parameters, create
from shared.models.iresnet import IResNet

RESOLUTIONS = (3, 6, 12, 48)
INDICATORS, ROUNDINGS = ("max", "min", "avg"), ("ceil", "near", "floor")


@torch.no_grad()
def small(seed: int = 0) -> nn.Module:
    """The embedded trunk with every number drawn, statistics of batch norms included."""
    torch.manual_seed(seed)
    trunk = build("small-iresnet", size=48, classes=2)
    for name, value in trunk.state_dict().items():
        if value.ndim == 1:
            near_1 = name.endswith(("weight", "running_var"))
            value.copy_(torch.rand_like(value) / 2 + (0.75 if near_1 else -0.25))
    return trunk.eval()


@torch.no_grad()
def trained(model: BTNet, seed: int = 1) -> BTNet:
    """Every number of the branches moved, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for branch in model.branches.values():
        for value in branch.state_dict().values():
            if value.is_floating_point():
                value.mul_(1 + 0.1 * torch.rand(value.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def model() -> BTNet:
    return trained(BTNet(RESOLUTIONS, small())).eval()


def image(height: int, width: int, seed: int = 0, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (channels, height, width), generator=generator, dtype=torch.uint8)


# -- counts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> BTNet:
    with torch.device("meta"):
        return BTNet((7, 14, 28, 56, 112))


@pytest.mark.parametrize(
    ("r", "parameters", "gmacs"),
    [
        (112, 43_590_848, 6.309),
        (56, 113_600, 5.933),
        (28, 490_688, 5.236),
        (14, 2_293_568, 4.276),
        (7, 21_302_848, 1.517),
    ],
)
def test_stored_parameters_and_gmacs_are_the_published(published, r, parameters, gmacs) -> None:
    assert published.stored_parameters(r) == parameters
    assert published.macs(r) / 1e9 == pytest.approx(gmacs, rel=1e-4)


@pytest.mark.parametrize(
    ("r", "parameters", "missed"),
    [
        (28, 488_128, ("layer3.0.downsample.1", "layer4.0.downsample.1", "features")),
        (14, 2_291_520, ("layer4.0.downsample.1", "features")),
        (7, 21_301_824, ("features",)),
    ],
)
def test_official_leaves_what_freezing_by_name_misses_with_the_trunk(
    published, r: int, parameters: int, missed: tuple[str, ...]
) -> None:
    branch = Branch(published.trunk, r, bn="official")
    assert branch.stored_parameters == parameters
    left = set(Branch(published.trunk, r).state_dict()) - set(branch.state_dict())
    assert left == {f"{name}.{what}" for name in missed for what in ("weight", "bias")}


def test_a_delta_holds_the_branch_and_batch_norms_alone(published) -> None:
    state = published.branches["14"].state_dict()
    trunk = published.trunk.state_dict()
    own = ("conv1.", "bn1.", "prelu.", "layer1.", "layer2.", "layer3.0.")
    norms = {name.rpartition(".")[0] for name in trunk if name.endswith("running_mean")}
    expected = {n for n in trunk if n.startswith(own) or n.rpartition(".")[0] in norms}
    assert set(state) == {n for n in expected if not n.startswith("layer1.0.downsample")}
    counted = [v.numel() for n, v in state.items() if "running" not in n and "tracked" not in n]
    assert sum(counted) == 2_293_568


def test_a_branch_that_owns_everything_is_a_network_of_its_own() -> None:
    trunk = small()
    whole = Branch(trunk, 6, end=len(parts(trunk)))
    mine, theirs = set(map(id, whole.parameters())), set(map(id, trunk.parameters()))
    assert not mine & theirs and not whole.shared
    shortcut = 16 * 16 + 2 * 16  # of stage 1, which becomes the identity
    assert whole.stored_parameters == count_parameters(trunk) - shortcut
    assert all(p.requires_grad for p in trunk.parameters() if p is not trunk.embedding_bn.weight)


# -- what is whose -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", range(6))
def test_shared_weights_are_the_trunks_objects_and_own_ones_are_not(end: int) -> None:
    trunk = small()
    branch = Branch(trunk, 6, end=end)
    theirs = {id(p) for p in trunk.parameters()}
    norms = {
        id(p) for m in branch.modules() if "BatchNorm" in type(m).__name__ for p in m.parameters()
    }
    own_parts = {id(p) for _, part in parts(branch.network)[: end + 1] for p in part.parameters()}
    if end == 5:
        own_parts = {id(p) for p in branch.parameters()}
    for name, p in branch.network.named_parameters():
        own = id(p) in norms or id(p) in own_parts
        assert (id(p) not in theirs) == own, name
        assert p.requires_grad == (own and name != "embedding_bn.weight"), name


def test_a_step_on_a_branch_moves_its_own_numbers_and_none_of_the_trunks() -> None:
    trunk = small()
    model = BTNet(RESOLUTIONS, trunk).train()
    before = copy.deepcopy(trunk.state_dict())
    was = copy.deepcopy(model.branches["6"].state_dict())
    others = copy.deepcopy(model.branches["12"].state_dict())
    fingerprint = model.trunk_fingerprint()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(2):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        model.embed(x, 6).square().sum().backward()
        model.trunk(torch.randn(1, 3, 48, 48))  # one image: a batch norm in training would refuse
        optimiser.step()
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
    assert model.trunk_fingerprint() == fingerprint
    now = model.branches["6"].state_dict()
    still = {name for name in now if torch.equal(now[name], was[name])}
    assert "features.weight" in still  # the head sets the scale of an embedding
    # and a bias that the next batch norm takes away again has no gradient
    assert all(name.endswith("bias") for name in still - {"features.weight"})
    now = model.branches["12"].state_dict()
    assert all(torch.equal(now[name], others[name]) for name in now)


def test_parts_and_their_sides_are_those_of_the_published_network() -> None:
    with torch.device("meta"):
        trunk = create("iresnet50")
    names = [name for name, _ in parts(trunk)]
    assert names[0] == "stem" and names[1:4] == ["stage1.1", "stage1.2", "stage1.3"]
    assert len(names) == 1 + 3 + 4 + 14 + 3
    assert sides(trunk) == [112] + [56] * 3 + [28] * 4 + [14] * 14 + [7] * 3


def test_trunk_map_is_the_trunks_own_and_runs_nothing_later() -> None:
    trunk = small()
    x = torch.randn(2, 3, 48, 48)
    _, maps = trunk(x)
    trunk.layer4 = nn.Sequential()  # would fail if it were run before the head
    for at, name in enumerate(("stem", "stage1", "stage2", "stage3")):
        assert torch.equal(trunk_map(trunk, x, at), maps[name])


# -- the forward pass ----------------------------------------------------------------------------


def plain(trunk: dict[str, Tensor], delta: dict[str, Tensor], x: Tensor, r: int, end: int):
    """T_r(B_r(x)) of the embedded network as functional calls: (embedding, [map of each part])."""
    state = {**trunk, **delta}

    def norm(key: str, x: Tensor) -> Tensor:
        fields = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{key}.{field}"] for field in fields), eps=1e-5)

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    x = F.prelu(norm("bn1", x), state["prelu.weight"])
    maps = [x]
    for stage in (1, 2, 3, 4):
        key, stride = f"layer{stage}.0", 1 if 48 // 2**stage >= r else 2
        out = F.conv2d(norm(f"{key}.bn1", x), state[f"{key}.conv1.weight"], padding=1)
        out = F.prelu(norm(f"{key}.bn2", out), state[f"{key}.prelu.weight"])
        out = F.conv2d(out, state[f"{key}.conv2.weight"], stride=stride, padding=1)
        if not (stage == 1 and end >= 1):
            x = F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=stride)
            x = norm(f"{key}.downsample.1", x)
        x = norm(f"{key}.bn3", out) + x
        maps.append(x)
    x = F.linear(norm("bn2", x).flatten(1), state["fc.weight"], state["fc.bias"])
    return norm("features", x), maps


@pytest.mark.parametrize("end", [None, 0, 1, 4, 5])
@pytest.mark.parametrize("r", [3, 6, 12, 24])
@torch.no_grad()
def test_a_branch_is_the_trunk_without_its_first_strides(r: int, end: int | None) -> None:
    trunk = small().double()
    branch = Branch(trunk, r, end=end).eval()
    for value in branch.state_dict().values():  # its own numbers, not the trunk's
        if value.is_floating_point():
            value.mul_(1.1)
    reach = {24: 1, 12: 2, 6: 3, 3: 4}[r]
    x = torch.randn(2, 3, r, r).double()
    state = branch.state_dict()
    last = reach if end is None else end
    embedding, maps = plain(trunk.state_dict(), state, x, r, last)
    found, z = branch(x)
    torch.testing.assert_close(found, embedding)
    assert branch.at == min(max(last, reach), 4)
    torch.testing.assert_close(z["z"], maps[branch.at])
    if last <= reach:
        assert z["z"].shape[2:] == (r, r)
        assert z["z"].shape == trunk_map(trunk, torch.randn(2, 3, 48, 48).double(), branch.at).shape
    assert "layer1.0.downsample.0.weight" not in state  # the identity, or the trunk's
    assert torch.equal(branch.features(x), found)


def test_a_small_net_has_branches_too() -> None:
    trunk = create("small-teacher").eval()
    assert sides(trunk) == [32, 16, 8, 4]
    for r, at in {32: 0, 16: 1, 8: 2, 4: 3}.items():
        branch = Branch(trunk, r).eval()
        embedding, maps = branch(torch.randn(2, 3, r, r))
        assert embedding.shape == (2, 128) and branch.at == at
        assert maps["z"].shape[1:] == trunk_map(trunk, torch.randn(1, 3, 64, 64), at).shape[1:]
    assert BTNet((4, 16, 64), trunk).eval()([image(9, 5), image(3, 3)]).shape == (2, 128)


# -- the router ----------------------------------------------------------------------------------

# Sizes around every boundary of {7, 14, 28, 112}, worked out by hand: 10.5, 21 and 70 are halfway.
AT = {
    "ceil": {1: 7, 6: 7, 7: 7, 8: 14, 14: 14, 15: 28, 28: 28, 29: 112, 112: 112, 113: 112},
    "floor": {1: 7, 6: 7, 7: 7, 8: 7, 13: 7, 14: 14, 27: 14, 28: 28, 111: 28, 112: 112, 999: 112},
    "near": {1: 7, 7: 7, 10: 7, 11: 14, 20: 14, 21: 14, 22: 28, 69: 28, 70: 28, 71: 112, 999: 112},
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("indicator", INDICATORS)
def test_boundaries_of_every_strategy(indicator: str, rounding: str) -> None:
    for side, expected in AT[rounding].items():
        assert select_branch(side, side, indicator, rounding) == expected
        other = {"max": max(1, side - 3), "min": side + 50, "avg": side + 1}[indicator]
        assert select_branch(side, other, indicator, rounding) == expected
        assert select_branch(other, side, indicator, rounding) == expected


def test_56_px_is_an_option() -> None:
    with_56 = (7, 14, 28, 56, 112)
    assert [select_branch(s, s, "max", "ceil", with_56) for s in (28, 29, 57)] == [28, 56, 112]
    assert [select_branch(s, s, "max", "near", with_56) for s in (42, 43, 84, 85)] == [
        28, 56, 56, 112,
    ]  # fmt: skip


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from(INDICATORS),
    st.lists(st.integers(1, 300), min_size=1, max_size=6),
)
def test_the_roundings_are_what_their_names_say(w, h, indicator, resolutions) -> None:
    side = {"max": max(w, h), "min": min(w, h), "avg": math.floor((w + h) / 2)}[indicator]
    chosen = {k: select_branch(w, h, indicator, k, resolutions) for k in ROUNDINGS}
    assert set(chosen.values()) <= set(resolutions)
    for r in resolutions:
        assert chosen["ceil"] <= r or r < side or chosen["ceil"] < side
        assert chosen["floor"] >= r or r > side or chosen["floor"] > side
        closer = abs(r - side) < abs(chosen["near"] - side)
        assert not closer and not (
            abs(r - side) == abs(chosen["near"] - side) and r < chosen["near"]
        )
    assert chosen["ceil"] >= side or chosen["ceil"] == max(resolutions)
    assert chosen["floor"] <= side or chosen["floor"] == min(resolutions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5), "0 x 5 px"),
        ((5, -1), "5 x -1 px"),
        ((5, 5, "mean"), "indicator 'mean'"),
        ((5, 5, "max", "up"), "rounding 'up'"),
        ((5, 5, "max", "ceil", ()), "no resolutions"),
    ],
)
def test_a_wrong_route_is_refused_in_one_line(arguments, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        select_branch(*arguments)
    assert "\n" not in str(caught.value)


# -- mixed batches -------------------------------------------------------------------------------

# height, width, channels: 6 to 124 px as in QMUL-SurvFace, and what no one expects
MIXED = [(20, 24, 3), (6, 6, 3), (1, 1, 3), (5, 200, 3), (124, 100, 3), (48, 48, 3), (20, 24, 1),
         (12, 12, 3), (9, 5, 1), (20, 24, 3), (3, 2, 3)]  # fmt: skip


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("indicator", INDICATORS)
@torch.no_grad()
def test_a_mixed_batch_is_one_image_at_a_time_in_order(model, indicator, rounding) -> None:
    images = [image(h, w, seed, c) for seed, (h, w, c) in enumerate(MIXED)]
    router = copy.copy(model)
    router.indicator, router.rounding = indicator, rounding
    together = router(images)
    assert together.shape == (len(images), 128)
    for one, row in zip(images, together, strict=True):
        r = select_branch(one.shape[2], one.shape[1], indicator, rounding, RESOLUTIONS)
        alone = model.network(r)(model.prepare([one], r))[0][0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)
    back = router(images[::-1]).flip(0)
    torch.testing.assert_close(back, together, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[9]).norm() > 1  # two images of one size do not stand for another


@torch.no_grad()
def test_a_batch_of_one_size_is_the_list_of_its_images(model) -> None:
    images = torch.stack([image(9, 7, seed) for seed in range(5)])
    torch.testing.assert_close(model(images), model(list(images)), rtol=1e-4, atol=1e-4)


def test_preparing_is_the_same_down_sampling_as_in_training(model) -> None:
    data = Data(kernel="bilinear", antialias=True)
    pixels = torch.stack([image(48, 48, seed) for seed in range(3)])
    for r in RESOLUTIONS:
        small_ones = low(pixels, r, mode="bilinear", antialias=True)
        assert torch.equal(model.prepare(pixels, r), normalise(small_ones, data))
        assert torch.equal(model.prepare(list(pixels), r), normalise(small_ones, data))
        # an image that has its size already is taken as it is
        assert torch.equal(model.prepare(small_ones, r), normalise(small_ones, data))


def bilinear_up(row: list[float], size: int) -> list[float]:
    """One line of pixels at `size` > len(row) positions; beyond the outer centres they repeat."""
    out = []
    for i in range(size):
        at = min(max((i + 0.5) * len(row) / size - 0.5, 0.0), len(row) - 1.0)
        left = min(int(at), len(row) - 2)
        out.append(row[left] + (at - left) * (row[left + 1] - row[left]))
    return out


def test_enlarging_is_bilinear_and_rounded_to_8_bits(model) -> None:
    small_one = image(4, 5, 3)
    found = model.prepare([small_one], 12)[0]
    for channel in range(3):
        wide = [bilinear_up(row, 12) for row in small_one[channel].tolist()]
        full = [bilinear_up(list(column), 12) for column in zip(*wide, strict=True)]
        expected = torch.tensor(full, dtype=torch.float64).T
        levels = (found[channel].double() * 0.5 + 0.5) * 255
        assert torch.allclose(levels, levels.round(), atol=1e-3)
        assert (levels - expected).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("shape", [(1, 1), (5, 200), (3000, 4000), (48, 48), (7, 7)])
@torch.no_grad()
def test_grey_float_and_8_bit_images_of_any_shape_are_the_same(model, shape) -> None:
    grey = image(*shape, channels=1)
    (r,) = model.route([shape[::-1]])
    expected = model.prepare([grey.expand(3, -1, -1)], r)
    assert expected.shape == (1, 3, r, r) and expected.isfinite().all()
    others = [grey, grey[0], to_float(grey), to_float(grey[0]).double()]
    for other in others:
        assert torch.equal(model.prepare([other], r), expected)
    assert torch.equal(model.prepare(others, r), expected.expand(4, -1, -1, -1))
    assert model([grey]).isfinite().all()


def test_mean_and_deviation_are_the_given_ones() -> None:
    model = BTNet((6, 48), small(), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    white = model.prepare([torch.full((3, 6, 6), 255, dtype=torch.uint8)], 6)[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([0.9 / 0.5, 0.8 / 0.25, 0.7 / 0.125]))


@torch.no_grad()
def test_an_empty_list_has_no_embeddings(model) -> None:
    assert model([]).shape == (0, 128)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\[B, C, H, W\] or a list"),
        (torch.zeros(1, 4, 8, 8), "images: .*1 or 3 channels"),
        ([image(8, 8), torch.zeros(2, 8, 8)], "image 1: .*1 or 3 channels"),
        ([image(8, 8), torch.zeros(8)], "image 1: "),
        ([torch.zeros(3, 0, 8)], "image 0: "),
        ([torch.zeros(3, 8, 8, dtype=torch.int64)], "image 0: torch.int64"),
    ],
)
def test_what_is_no_image_is_refused_by_its_number(model, images, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model(images)
    assert "\n" not in str(caught.value)


# -- deltas --------------------------------------------------------------------------------------


def test_a_saved_delta_gives_the_same_bits_on_a_fresh_trunk(model, tmp_path) -> None:
    fresh = BTNet(RESOLUTIONS, small()).eval()
    x = torch.randn(3, 3, 6, 6)
    assert not torch.equal(fresh.embed(x, 6), model.embed(x, 6))
    for r in (3, 6, 12):
        model.save_branch(r, tmp_path / f"{r}.safetensors")
        assert fresh.load_branch(tmp_path / f"{r}.safetensors") == r
    images = [image(h, w, seed, c) for seed, (h, w, c) in enumerate(MIXED)]
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))
    assert not list(tmp_path.glob(".*"))
    again = BTNet(RESOLUTIONS, small()).eval()
    for r in (3, 6, 12):
        again.load_branch_state_dict(r, model.branch_state_dict(r))
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_a_delta_is_as_large_as_what_it_stores(model, tmp_path) -> None:
    model.save_branch(12, tmp_path / "12.safetensors")
    size = (tmp_path / "12.safetensors").stat().st_size
    norms = [m for m in model.branches["12"].modules() if hasattr(m, "running_mean")]
    statistics = sum(2 * 4 * len(m.running_mean) + 8 for m in norms)
    header = size - 4 * model.stored_parameters(12) - statistics
    assert 0 < header < 10_000


def test_a_delta_of_another_trunk_is_refused_and_changes_nothing(model, tmp_path) -> None:
    other = BTNet(RESOLUTIONS, small(seed=5))
    before = copy.deepcopy(other.branches["6"].state_dict())
    model.save_branch(6, tmp_path / "6.safetensors")
    with pytest.raises(
        ValueError, match=r"6\.safetensors: its trunk is \w{16}, this model's \w{16}"
    ):
        other.load_branch(tmp_path / "6.safetensors")
    with pytest.raises(ValueError, match=r"a delta for 6 px trunk is \w{16}"):
        other.load_branch_state_dict(6, model.branch_state_dict(6))
    now = other.branches["6"].state_dict()
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_what_does_not_belong_is_refused_in_one_line(model, tmp_path) -> None:
    path = tmp_path / "branch.safetensors"
    model.save_branch(6, path)
    refused = [
        (BTNet((3, 12, 48), small()), "no network for 6 px"),
        (BTNet(RESOLUTIONS, small(), kernel="bicubic"), "kernel is bilinear, this model's bicubic"),
        (BTNet(RESOLUTIONS, small(), bn="official"), "bn is paper, this model's official"),
    ]
    for other, message in refused:
        with pytest.raises(ValueError, match=message) as caught:
            other.load_branch(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="no readable safetensors"):
        model.load_branch(path)
    with pytest.raises(FileNotFoundError):
        model.load_branch(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="48 px is the trunk itself"):
        model.save_branch(48, path)


def test_other_names_and_shapes_are_refused(model) -> None:
    state = OrderedDict(model.branch_state_dict(6))  # without metadata: whose it is, is not said
    before = copy.deepcopy(model.branches["6"].state_dict())
    for name, value in [
        ("bn1.weight", None),
        ("bn1.weight", torch.ones(3)),
        ("odd", torch.ones(1)),
    ]:
        changed = OrderedDict(state)
        if value is None:
            del changed[name]
        else:
            changed[name] = value
        with pytest.raises(ValueError, match=f"does not fit this network: {name} is"):
            model.load_branch_state_dict(6, changed)
    now = model.branches["6"].state_dict()
    assert all(torch.equal(now[name], before[name]) for name in before)
    model.load_branch_state_dict(6, state)


def test_the_fingerprint_names_every_number_and_name_of_the_trunk(model) -> None:
    assert BTNet(RESOLUTIONS, small()).trunk_fingerprint() == model.trunk_fingerprint()
    channels_last = BTNet(RESOLUTIONS, small().to(memory_format=torch.channels_last))
    assert channels_last.trunk_fingerprint() == model.trunk_fingerprint()
    other = BTNet(RESOLUTIONS, small())
    other.trunk.bn2.running_var[3].mul_(1 + 2e-7)
    assert other.trunk_fingerprint() != model.trunk_fingerprint()


@torch.no_grad()
def test_a_copy_shares_its_own_trunk_and_a_whole_state_dict_goes_back(model) -> None:
    copied = copy.deepcopy(model)
    shared = {id(p) for p in copied.trunk.parameters()}
    for branch in copied.branches.values():
        assert id(branch.network.fc.weight) in shared
    fresh = BTNet(RESOLUTIONS, small(seed=3)).eval()
    state = model.state_dict()
    assert "branches.6.fc.weight" not in state and "trunk.fc.weight" in state
    fresh.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 6, 6)
    for other in (copied, fresh):
        assert torch.equal(other.embed(x, 6), model.embed(x, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(resolutions=(7, 48)), "no branch of 7 px: .* 3, 6, 12, 24 px"),
        (dict(resolutions=(6, 12)), "the largest must be 48 px"),
        (dict(resolutions=()), "no resolutions"),
        (dict(kernel="lanczos"), "no kernel 'lanczos'"),
        (dict(bn="both"), "no bn 'both'"),
        (dict(indicator="width"), "no indicator"),
        (dict(trunk=nn.Linear(2, 2)), "Linear cannot be a trunk"),
        (dict(trunk=IResNet((1, 1, 1, 1), input="upsample", widths=(4, 4, 4, 4))), "native input"),
    ],
)
def test_what_the_trunk_has_not_is_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        BTNet(**{"resolutions": RESOLUTIONS, "trunk": small(), **arguments})
    assert "\n" not in str(caught.value)


def test_a_branch_refuses_the_trunks_own_size_and_an_end_beyond_it() -> None:
    with pytest.raises(ValueError, match="no branch of 48 px"):
        Branch(small(), 48)
    with pytest.raises(ValueError, match="part 0 to 5 .* not at 6"):
        Branch(small(), 6, end=6)
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 6, 6\]"):
        Branch(small(), 6)(torch.zeros(1, 3, 12, 12))


# -- aggregation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_a_template_is_the_sum_of_an_identitys_embeddings(weighted: bool) -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(9, 5).double()
    ids = torch.tensor([7, 2, 7, 7, 30, 2, 30, 5, 7])
    weights = torch.rand(9).double() if weighted else None
    templates, people = aggregate(embeddings, ids, weights)
    assert people.tolist() == [2, 5, 7, 30]
    for person, template in zip(people.tolist(), templates, strict=True):
        total = [0.0] * 5
        for n in range(9):
            if ids[n] == person:
                w = 1.0 if weights is None else float(weights[n])
                total = [t + w * float(v) for t, v in zip(total, embeddings[n], strict=True)]
        torch.testing.assert_close(template, torch.tensor(total).double())


def test_an_aggregate_of_other_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="one id"):
        aggregate(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"weights \[2\]"):
        aggregate(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2))
