"""The modules around the baselines' losses: what they read, draw, remember and leave alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import losses, model
from baselines.config import WEIGHTS
from baselines.model import METHODS, Seen, Sizes, sizes
from shared.config import MATCHED, Network
from shared.models.recogniser import Recogniser

M, B, CLASSES = 30, 6, 5
LABELS = torch.arange(M) % CLASSES
SIZES = Sizes(
    student=7, teacher=9,
    student_maps={"stem": 2, "stage1": 3, "stage2": 4, "stage3": 5},
    teacher_maps={"stem": 3, "stage1": 5, "stage2": 6, "stage2.inner": 6, "stage3": 8},
    images=M, classes=CLASSES, scale=8.0, margin=0.3,
)  # fmt: skip


def seen(step: int = 0, b: int = B, **changes: object) -> Seen:
    """Batch `step`: images step * b and on, of M; all that depends on the step alone."""
    g = torch.Generator().manual_seed(step)
    index = (step * b + torch.arange(b)) % M

    def maps(channels: dict[str, int], side: int) -> dict[str, Tensor]:
        return {
            k: torch.rand(b, c, side // (i + 1), side // (i + 1), generator=g)
            for i, (k, c) in enumerate(channels.items())
        }

    one = Seen(
        e_s=torch.randn(b, SIZES.student, generator=g),
        e_t=torch.randn(b, SIZES.teacher, generator=g),
        z_s=torch.randn(b, CLASSES, generator=g),
        z_t=torch.randn(b, CLASSES, generator=g),
        maps_s=maps(dict(SIZES.student_maps), 8),
        maps_t=maps(dict(SIZES.teacher_maps), 20),
        y=LABELS[index],
        index=index,
        epoch=0,
        generator=g,
    )
    return replace(one, **changes)  # type: ignore[arg-type]


def made(name: str, like: Sizes = SIZES) -> model.Method:
    torch.manual_seed(1)
    return METHODS[name](like)


# -- all -----------------------------------------------------------------------------------------


def test_there_is_a_method_for_each_weight() -> None:
    assert set(METHODS) == set(WEIGHTS) - {"none"}


def test_the_published_weights() -> None:
    found = {name: (w.cls, w.own, w.kd) for name, w in WEIGHTS.items()}
    del found["cosine"]  # has none
    assert found == {
        "none": (1, 0, 0), "kd": (0.1, 0.9, 0), "fitnet": (1, 100, 0), "at": (1, 1000, 0),
        "pkt": (1, 30_000, 0), "sp": (1, 3000, 0), "rkd": (1, 1, 0), "cc": (1, 0.02, 0),
        "vid": (1, 1, 0), "crd": (1, 0.8, 1), "crcd": (1, 1, 0.9), "dkd": (1, 1, 0),
        "adadistill": (0, 1, 0),
    }  # fmt: skip


def test_the_published_hyper_parameters() -> None:
    assert model.KD.TEMPERATURE == model.DKD.TEMPERATURE == 4
    assert (model.DKD.TARGET, model.DKD.NON_TARGET, model.DKD.WARM_EPOCHS) == (1, 8, 20)
    assert (model.CRD.K, model.CRD.TAU, model.CRD.MOMENTUM, model.CRD.DIM) == (
        16384,
        0.07,
        0.5,
        128,
    )
    assert (model.CRCD.K, model.CRCD.TAU, model.CRCD.MOMENTUM) == (500, 0.05, 0.5)
    assert model.CC.DIM == 128
    assert model.CRD(replace(SIZES, images=20_000)).k == 16384
    assert model.CRD(SIZES).k == M - 1


@pytest.mark.parametrize("name", METHODS)
def test_only_what_is_needed_is_read_and_the_students_side_gets_gradient(name: str) -> None:
    method, one = made(name), seen()
    nothing = torch.full((B, 1), math.nan)
    for kind, fields in (("embedding", ("e_s", "e_t")), ("logits", ("z_s", "z_t"))):
        if kind not in method.needs:
            one = replace(one, **dict.fromkeys(fields, nothing))
    if "maps" not in method.needs:
        one = replace(one, maps_s={}, maps_t={})
    for x in (one.e_s, one.z_s, *one.maps_s.values()):
        x.requires_grad_()
    loss = method(one)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
    assert any((x.grad != 0).any() for x in (one.e_s, one.z_s, *one.maps_s.values())
               if x.grad is not None)  # fmt: skip
    assert all((p.grad != 0).any() for p in method.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_a_step_after_a_round_trip_is_the_same_bit_for_bit(name: str) -> None:
    method = made(name)
    for step in range(3):
        method(seen(step))
    torch.manual_seed(99)
    other = METHODS[name](SIZES)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    for step in (3, 4):
        assert method(seen(step)).item() == other(seen(step)).item()
    for key, value in method.state_dict().items():
        assert (value == other.state_dict()[key]).all(), key


@pytest.mark.parametrize("name", METHODS)
def test_draws_come_from_the_steps_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    method = made(name)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    method(seen())
    assert (torch.get_rng_state() == state).all()
    torch.set_rng_state(before)


@pytest.mark.parametrize("name", METHODS)
def test_under_autocast_the_loss_is_computed_in_float32(name: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = made(name)(seen())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(made(name)(seen()).item(), rel=1e-6)


# -- single methods ------------------------------------------------------------------------------


def test_at_and_vid_sum_over_the_stages_that_both_have_and_sp_takes_the_last() -> None:
    one, stages = seen(), ("stage1", "stage2", "stage3")
    wanted = sum(losses.attention_transfer(one.maps_s[k], one.maps_t[k]) for k in stages)
    assert made("at")(one).item() == pytest.approx(wanted.item(), rel=1e-6)
    wanted = losses.sp(one.maps_s["stage3"], one.maps_t["stage3"])
    assert made("sp")(one).item() == wanted.item()
    vid = made("vid")
    variance = [F.softplus(rho) + 1e-5 for rho in vid.rho.values()]
    torch.testing.assert_close(torch.cat(variance), torch.full((5 + 6 + 8,), 5.0))
    total = 0.0
    for k in stages:
        side = min(one.maps_s[k].shape[2], one.maps_t[k].shape[2])
        a, b = (F.adaptive_avg_pool2d(x, side) for x in (one.maps_s[k], one.maps_t[k]))
        total += 0.5 * ((vid.regressors[k](a) - b) ** 2 / 5 + math.log(5)).mean().item()
    assert vid(one).item() == pytest.approx(total, rel=1e-5)


def test_fitnet_compares_the_second_stage_at_the_smaller_size() -> None:
    one, method = seen(), made("fitnet").eval()
    b = F.adaptive_avg_pool2d(one.maps_t["stage2"], one.maps_s["stage2"].shape[2])
    conv = method.regressor[0]
    a = F.relu(F.conv2d(one.maps_s["stage2"], conv.weight, conv.bias) / math.sqrt(1 + 1e-5))
    assert method(one).item() == pytest.approx(((a - b) ** 2).mean().item(), rel=1e-5)


def test_dkd_warms_up_over_twenty_epochs() -> None:
    method = made("dkd")
    found = [method(seen(epoch=epoch)).item() for epoch in (0, 9, 19, 50)]
    assert [v / found[3] for v in found] == pytest.approx([1 / 20, 1 / 2, 1, 1])


@pytest.mark.parametrize("name", ["cosine", "adadistill"])
def test_embeddings_of_one_size_are_compared_as_they_are(name: str) -> None:
    like = replace(SIZES, student=SIZES.teacher)
    assert not list(made(name, like).parameters())
    one = seen(e_s=seen().e_t.clone())
    assert made("cosine", like)(one).item() == pytest.approx(0, abs=1e-6)


def test_adadistill_moves_the_centres_of_the_batch_before_its_loss() -> None:
    method, one = made("adadistill", replace(SIZES, student=9)), seen(b=3)
    one = replace(one, e_s=torch.randn(3, 9, generator=one.generator))
    before = method.centers.clone()
    loss = method(one)
    wanted = losses.moved_centers(before, one.e_s, one.e_t, one.y)
    assert (method.centers == wanted).all()
    assert ((method.centers != before).any(1) == torch.tensor([1, 1, 1, 0, 0]).bool()).all()
    expected = losses.adadistill(one.e_s, wanted, one.y, scale=8.0, margin=0.3)
    assert loss.item() == expected.item()


# -- memories ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["crd", "crcd"])
def test_memories_move_where_the_batch_is_and_nowhere_else(name: str) -> None:
    method, one = made(name), seen(2)
    before = {k: getattr(method, k).clone() for k in ("memory_s", "memory_t")}
    for rows in before.values():
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(M))
    method(one).backward()
    for k, embed, e in (
        ("memory_s", method.embed_s, one.e_s), ("memory_t", method.embed_t, one.e_t)
    ):  # fmt: skip
        rows, old = getattr(method, k), before[k]
        wanted = F.normalize(0.5 * old[one.index] + 0.5 * F.normalize(embed(e)), dim=1)
        torch.testing.assert_close(rows[one.index], wanted)
        rest = torch.ones(M, dtype=torch.bool)
        rest[one.index] = False
        assert (rows[rest] == old[rest]).all() and not rows.requires_grad
    known = method.labels[one.index]
    assert (known == one.y).all() and (method.labels == -1).sum() == M - B


@pytest.mark.parametrize("name", ["crd", "crcd"])
def test_no_negative_is_of_the_images_own_class(name: str) -> None:
    method = made(name)
    for step in range(M // B):
        drawn = method.negatives(LABELS[step * B : (step + 1) * B], torch.Generator())
        own = LABELS[step * B : (step + 1) * B, None]
        assert (method.labels[drawn] != own).all()
        method(seen(step))
    assert (method.labels == LABELS).all()
    assert (LABELS[method.negatives(LABELS, torch.Generator())] != LABELS[:, None]).all()


def test_negatives_are_uniform_over_the_other_classes() -> None:
    torch.manual_seed(0)
    uneven = torch.tensor([0] * 9 + [1] * 3 + [2] * 18)
    method = model.CRD(SIZES)
    method.labels.copy_(uneven[torch.randperm(M)])
    method.k = 20_000
    drawn = method.negatives(torch.arange(3), torch.Generator().manual_seed(1))
    for label in range(3):
        counts = torch.bincount(drawn[label], minlength=M)
        allowed = method.labels != label
        assert (counts[~allowed] == 0).all()
        expected = method.k / allowed.sum().item()
        assert (counts[allowed] - expected).abs().max() < 5 * math.sqrt(expected)


def nce_by_hand(positive: Tensor, negatives: Tensor, tau: float, log_z: float) -> float:
    n, total = negatives.shape[1], 0.0
    for p, row in zip(positive.tolist(), negatives.tolist(), strict=True):
        e = math.exp(p / tau - log_z)
        total -= math.log(e / (e + n / M))
        total -= sum(math.log(1 - 1 / (1 + n / M * math.exp(log_z - v / tau))) for v in row)
    return total / len(positive)


def log_z_by_hand(positive: Tensor, negatives: Tensor, tau: float) -> float:
    cosines = torch.cat([positive[:, None], negatives], 1).flatten().tolist()
    return math.log(M * sum(math.exp(v / tau) for v in cosines) / len(cosines))


def test_crd_is_the_two_sides_against_the_other_networks_memory() -> None:
    """The first step sets both Z; the second is scored by them, and by the moved memories."""
    method, log_z = made("crd").double(), {}
    for step in (0, 0):
        one = seen(step)
        one = replace(one, e_s=one.e_s.double(), e_t=one.e_t.double())
        v_s, v_t = F.normalize(method.embed_s(one.e_s)), F.normalize(method.embed_t(one.e_t))
        memory = {"s": method.memory_t.clone(), "t": method.memory_s.clone()}
        state = one.generator.get_state()
        loss = method(one)
        one.generator.set_state(state)
        drawn = method.negatives(one.y, one.generator)
        wanted = 0.0
        for side, v in (("s", v_s), ("t", v_t)):
            positive = (v * memory[side][one.index]).sum(1)
            negatives = torch.einsum("bd,bkd->bk", v, memory[side][drawn])
            log_z.setdefault(side, log_z_by_hand(positive, negatives, 0.07))
            wanted += nce_by_hand(positive, negatives, 0.07, log_z[side])
        assert loss.item() == pytest.approx(wanted, rel=1e-9)
    assert method.z_s.log_z.item() == pytest.approx(log_z["s"], rel=1e-9)
    assert method.z_t.log_z.item() == pytest.approx(log_z["t"], rel=1e-9)


def test_crcd_is_the_two_sides_relations_written_out() -> None:
    method, one = made("crcd").double(), seen()
    one = replace(one, e_s=one.e_s.double(), e_t=one.e_t.double())
    v_s, v_t = F.normalize(method.embed_s(one.e_s)), F.normalize(method.embed_t(one.e_t))
    memory = {"s": method.memory_t.clone(), "t": method.memory_s.clone()}
    state = one.generator.get_state()
    loss = method(one)
    one.generator.set_state(state)
    drawn = method.negatives(one.y, one.generator)
    partners = [model.derangement(B, one.generator) for _ in range(method.ANCHORS)]
    wanted = 0.0
    for side, v in (("s", v_s), ("t", v_t)):
        positive, negatives, itself = [], [], []
        for b in range(B):
            for partner in partners:
                anchor = one.index[partner[b]].item()
                assert anchor != one.index[b]
                a, rows = memory[side][anchor], memory[side]
                query = F.normalize(v[b] - a, dim=0)
                positive.append(query @ F.normalize(rows[one.index[b]] - a, dim=0))
                negatives.append(F.normalize(rows[drawn[b]] - a, dim=1) @ query)
                itself.append(drawn[b] == anchor)
        cosines = torch.stack(negatives).masked_fill(torch.stack(itself), -torch.inf)
        z = log_z_by_hand(torch.stack(positive), cosines, 0.05)
        wanted += nce_by_hand(torch.stack(positive), cosines, 0.05, z)
    assert loss.item() == pytest.approx(wanted, rel=1e-6)


# -- sizes and bad input -------------------------------------------------------------------------


def networks() -> tuple[Recogniser, Recogniser]:
    d = MATCHED["data"]
    return (Recogniser(MATCHED["student"], d.lr_input, 4),
            Recogniser(Network(name="small-teacher", head="cosface"), d.hr, 4))  # fmt: skip


def test_sizes_are_those_of_the_networks_which_stay_as_they_are() -> None:
    student, teacher = networks()
    student.train(), teacher.eval()
    before = copy.deepcopy(student.state_dict())
    found = sizes(student, teacher, MATCHED["data"], images=9, classes=4, scale=3.0, margin=0.1)
    assert (found.student, found.teacher) == (student.dim, teacher.dim)
    _, maps = student.eval()(torch.zeros(2, 3, 16, 16), maps=True)
    assert found.student_maps == {name: x.shape[1] for name, x in maps.items()}
    student.train()
    assert list(found.teacher_maps)[0] == "stem" and "stage3" in found.teacher_maps
    assert (found.images, found.classes, found.scale, found.margin) == (9, 4, 3.0, 0.1)
    assert not teacher.training
    assert all((value == before[key]).all() for key, value in student.state_dict().items())


def test_bad_input_is_refused_in_one_line() -> None:
    student, teacher = networks()
    for images, classes in ((1, 4), (9, 1)):
        with pytest.raises(ValueError, match="a method needs at least 2 of each"):
            sizes(student, teacher, MATCHED["data"], images=images, classes=classes, scale=3.0,
                  margin=0.1)  # fmt: skip
    for name in ("fitnet", "at", "vid", "sp"):
        with pytest.raises(ValueError, match="this method needs .* of both"):
            METHODS[name](replace(SIZES, teacher_maps={"stem": 3}))
        with pytest.raises(ValueError, match="student has maps none"):
            METHODS[name](replace(SIZES, student_maps={}))
    with pytest.raises(ValueError, match="one image"):
        made("crcd")(seen(b=1))
    with pytest.raises(ValueError, match="one image"):
        made("cc")(seen(b=1))
