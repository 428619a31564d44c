import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from shared.models.heads import AdaFace, ArcFace, CosFace, CurricularFace, MagFace

HEADS = [
    (ArcFace, 64.0, 0.5),
    (ArcFace, 16.0, 1.2),
    (CosFace, 64.0, 0.4),
    (CosFace, 16.0, 0.2),
]
EVERY = [ArcFace, CosFace, CurricularFace, MagFace, AdaFace]


def plain_logits(head_type, feature, weight, label, scale, margin):
    """The printed formulas, angle by angle, in the dtype of the inputs."""
    rows = []
    for z, y in zip(feature, label.tolist(), strict=True):
        row = []
        for k, w in enumerate(weight):
            cosine = (z @ w) / (z.square().sum().sqrt() * w.square().sum().sqrt())
            if k == y and head_type is CosFace:
                cosine = cosine - margin
            elif k == y:
                theta = torch.acos(cosine)
                if theta.item() < math.pi - margin:
                    cosine = torch.cos(theta + margin)
                else:
                    cosine = cosine - margin * math.sin(margin)
            row.append(scale * cosine)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def batch(classes=7, dim=5):
    """Features of which the first four point close to or away from their class's weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    label = torch.tensor([0, 3, 6, 2, 5, 5])
    feature = torch.randn(6, dim, generator=generator, dtype=torch.float64)
    near = weight[label[:4]] * torch.tensor([1.0, -1.0, -2.0, 0.5])[:, None]
    feature[:4] = near + 0.1 * feature[:4]
    return feature, weight, label


@pytest.mark.parametrize(("head_type", "scale", "margin"), HEADS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["f64", "f32"]
)
def test_values_and_gradients_match_a_plain_loop(head_type, scale, margin, dtype, tolerance):
    feature, weight, label = batch()
    expected_in = feature.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = plain_logits(head_type, *expected_in, label, scale, margin)
    if head_type is ArcFace:  # both branches of the fallback are in the batch
        cosine = F.cosine_similarity(feature, weight[label])
        beyond = cosine <= math.cos(math.pi - margin)
        assert beyond.any() and not beyond.all()

    head = head_type(5, 7, scale=scale, margin=margin).to(dtype)
    head.weight.data.copy_(weight)
    z = feature.to(dtype).requires_grad_()
    logits = head(z, label)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance * scale)

    loss_weights = torch.randn(6, 7, generator=torch.Generator().manual_seed(1)).double()
    expected_grads = torch.autograd.grad((expected * loss_weights).sum(), expected_in)
    grads = torch.autograd.grad((logits * loss_weights.to(dtype)).sum(), (z, head.weight))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(
            grad.double(), expected_grad, rtol=tolerance, atol=tolerance * scale
        )


@pytest.mark.parametrize("head_type", EVERY)
def test_without_label_the_logits_are_the_scaled_cosines(head_type):
    feature, weight, _ = batch()
    head = head_type(5, 7, scale=30.0).double()
    head.weight.data.copy_(weight)
    expected = 30 * torch.stack([F.cosine_similarity(feature, w[None]) for w in weight], dim=1)
    torch.testing.assert_close(head(feature), expected)


@pytest.mark.parametrize("head_type", [ArcFace, CosFace])
def test_defaults_are_the_published_ones(head_type):
    head = head_type(4, 3)
    assert head.scale == 64.0
    assert head.margin == {ArcFace: 0.5, CosFace: 0.4}[head_type]
    assert head.weight.shape == (3, 4)
    assert (
        head.penalty.shape == ()
        and head.penalty.item() == 0
        and head.penalty.dtype.is_floating_point
    )
    assert list(head.state_dict()) == ["weight"]


@pytest.mark.parametrize("head_type", EVERY)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_cosine_exactly_one_and_minus_one(head_type, sign, dtype):
    head = head_type(4, 4).to(dtype)
    head.weight.data.copy_(torch.eye(4))
    feature = (sign * torch.eye(4, dtype=dtype)).requires_grad_()
    label = torch.arange(4)
    assert torch.equal(head(feature).diagonal(), torch.full((4,), 64 * sign, dtype=dtype))
    (F.cross_entropy(head(feature, label), label) + head.penalty).backward()
    assert feature.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_arcface_at_cosine_one_is_within_the_clamp_of_cos_m():
    head = ArcFace(2, 2)
    head.weight.data.copy_(torch.eye(2))
    logit = head(torch.eye(2), torch.arange(2))[0, 0].item()
    assert logit == pytest.approx(64 * math.cos(0.5), abs=64 * math.sin(0.5) * 1e-7**0.5 + 1e-4)


@pytest.mark.parametrize("head_type", EVERY)
def test_logits_are_float32_under_bf16_autocast_and_with_bf16_features(head_type):
    torch.manual_seed(0)
    head = head_type(16, 9)
    feature, label = torch.randn(5, 16), torch.arange(5)
    head.eval()
    expected = head(feature, label)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(feature, label)
        assert head(feature.bfloat16(), label).dtype == torch.float32
        assert head(feature).dtype == torch.float32
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("head_type", EVERY)
def test_bad_labels_and_features_are_clear_errors(head_type):
    head = head_type(4, 3)
    feature = torch.randn(2, 4)
    for label in ([0, 3], [-1, 2]):
        with pytest.raises(ValueError, match="head has classes 0 to 2"):
            head(feature, torch.tensor(label))
    with pytest.raises(ValueError, match=r"expected int64 labels \[2\]"):
        head(feature, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"expected int64 labels \[2\]"):
        head(feature, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"expected features \[B, 4\], got \[2, 5\]"):
        head(torch.randn(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="scale"):
        head_type(4, 3, scale=0.0)
    with pytest.raises(ValueError, match="margin"):
        head_type(4, 3, margin=-0.1)


# -- heads with statistics or a regulariser ------------------------------------------------------


def cosines(z, weight):
    return [(z @ w) / ((z @ z).sqrt() * (w @ w).sqrt()) for w in weight]


def plain_curricular(feature, weight, label, t, *, scale=64.0, margin=0.5):
    """Huang et al. 2020, row by row; t is the one the batch is scored by."""
    rows = []
    for z, y in zip(feature, label.tolist(), strict=True):
        row = cosines(z, weight)
        theta = torch.acos(row[y])
        hard = torch.cos(theta + margin)
        row = [c * (t + c) if k != y and c > hard else c for k, c in enumerate(row)]
        beyond = theta.item() >= math.pi - margin
        row[y] = row[y] - margin * math.sin(margin) if beyond else hard
        rows.append(torch.stack(row) * scale)
    return torch.stack(rows)


def plain_magface(feature, weight, label, *, scale=64.0):
    """Meng et al. 2021: logits and the regulariser, row by row."""
    rows, pulls = [], []
    for z, y in zip(feature, label.tolist(), strict=True):
        row = cosines(z, weight)
        a = (z @ z).sqrt().clip(10, 110)
        if row[y] > 0:
            row[y] = torch.cos(torch.acos(row[y]) + 0.45 + 0.35 * (a - 10) / 100)
        rows.append(torch.stack(row) * scale)
        pulls.append(a / 110**2 + 1 / a)
    return torch.stack(rows), 35 * sum(pulls) / len(pulls)


def plain_adaface(feature, weight, label, mean, std, *, scale=64.0, margin=0.4, h=0.333):
    """Kim et al. 2022, row by row, with the statistics the batch is scored by."""
    rows = []
    for z, y in zip(feature, label.tolist(), strict=True):
        row = cosines(z, weight)
        length = min(max(z.detach().norm().item(), 0.001), 100)
        quality = min(max((length - mean) / ((std + 0.001) / h), -1), 1)
        theta = (torch.acos(row[y]) - margin * quality).clip(0, math.pi)
        row[y] = torch.cos(theta) - (margin * quality + margin)
        rows.append(torch.stack(row) * scale)
    return torch.stack(rows)


def lengthened(feature, lengths=(3.0, 40.0, 75.0, 12.0, 100.0, 240.0)):
    return F.normalize(feature) * torch.tensor(lengths, dtype=feature.dtype)[:, None]


def statistics(head):
    return {k: v.item() for k, v in head.state_dict().items() if k != "weight"}


def set_up(head_type, dtype=torch.float64, **statistics):
    feature, weight, label = batch()
    head = head_type(5, 7).to(dtype)
    head.weight.data.copy_(weight)
    for name, value in statistics.items():
        getattr(head, name).fill_(value)
    return head, lengthened(feature).to(dtype), weight, label


def expected_of(head_type, feature, weight, label, **statistics):
    if head_type is CurricularFace:
        return plain_curricular(feature, weight, label, **statistics), torch.zeros(())
    if head_type is MagFace:
        return plain_magface(feature, weight, label)
    mean, std = statistics["batch_mean"], statistics["batch_std"]
    return plain_adaface(feature, weight, label, mean, std), torch.zeros(())


SCORED_BY = {CurricularFace: {"t": 0.3}, MagFace: {}, AdaFace: {"batch_mean": 40.0, "batch_std": 9}}


@pytest.mark.parametrize("head_type", SCORED_BY)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["f64", "f32"]
)
def test_statistical_heads_match_a_plain_loop_in_value_and_gradient(head_type, dtype, tolerance):
    head, feature, weight, label = set_up(head_type, dtype, **SCORED_BY[head_type])
    head.eval()
    expected_in = feature.double().requires_grad_(), weight.clone().requires_grad_()
    expected, pull = expected_of(head_type, *expected_in, label, **statistics(head))
    z = feature.clone().requires_grad_()
    logits = head(z, label)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance * 64)
    torch.testing.assert_close(head.penalty.double(), pull.double(), rtol=tolerance, atol=0)

    loss_weights = torch.randn(6, 7, generator=torch.Generator().manual_seed(1)).double()
    loss = (expected * loss_weights).sum() + 100 * pull
    ours = (logits * loss_weights.to(dtype)).sum() + 100 * head.penalty
    grads = torch.autograd.grad(ours, (z, head.weight))
    for grad, expected_grad in zip(grads, torch.autograd.grad(loss, expected_in), strict=True):
        torch.testing.assert_close(
            grad.double(), expected_grad, rtol=tolerance, atol=tolerance * 64
        )


def test_the_batch_of_those_loops_reaches_every_branch():
    head, feature, weight, label = set_up(CurricularFace)
    cosine = torch.stack([torch.stack(cosines(z, weight)) for z in feature])
    target = cosine.gather(1, label[:, None])
    others = torch.ones_like(cosine, dtype=torch.bool).scatter(1, label[:, None], False)
    hard = cosine > torch.cos(torch.acos(target) + 0.5)
    assert (hard & others).any() and (~hard & others).any()
    assert (target > 0).any() and (target < 0).any()
    assert (target < math.cos(math.pi - 0.5)).any() and (torch.acos(target) < 0.4).any()
    quality = (feature.norm(dim=1).clamp(max=100) - 40) / 9 * 0.333
    assert (quality > 1).any() and (quality < -1).any() and (quality.abs() < 1).any()


@pytest.mark.parametrize("head_type", EVERY)
def test_gradients_match_finite_differences(head_type):
    head, feature, _, label = set_up(head_type)
    # statistics and the clips of length and quality are piecewise constant: rows within them
    head.eval()
    z = feature[[1, 2, 3]].clone().requires_grad_()

    def score(z, weight):
        logits = torch.func.functional_call(head, {"weight": weight}, (z, label[[1, 2, 3]]))
        return logits, head.penalty

    if head_type is AdaFace:  # quality carries no gradient by design: let it be clipped
        head.batch_mean.fill_(1e4)
    assert torch.autograd.gradcheck(score, (z, head.weight), eps=1e-6, atol=1e-4)


def test_curricular_compares_negatives_with_cos_theta_plus_m_also_beyond_the_fallback():
    head = CurricularFace(2, 3).double().eval()
    head.t.fill_(0.3)
    # theta_y = pi: cos(theta_y + .5) is -.88, between the negatives' -.95 and -.5
    cosine = torch.tensor([-1.0, -0.95, -0.5], dtype=torch.float64)
    head.weight.data.copy_(torch.stack([cosine, (1 - cosine.square()).sqrt()], dim=1))
    feature = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([-1 - 0.5 * math.sin(0.5), -0.95, -0.5 * (0.3 - 0.5)])
    torch.testing.assert_close(head(feature, torch.tensor([0]))[0], 64 * expected.double())


def test_curricular_t_follows_the_mean_target_cosine_and_is_used_at_once():
    head, feature, weight, label = set_up(CurricularFace)
    t = 0.0
    for shift in range(3):
        y = (label + shift) % 7
        mean = sum(cosines(z, weight)[k].item() for z, k in zip(feature, y.tolist(), strict=True))
        t = 0.01 * mean / 6 + 0.99 * t
        torch.testing.assert_close(head(feature, y), plain_curricular(feature, weight, y, t))
        assert head.t.item() == pytest.approx(t, abs=1e-12)


def test_adaface_statistics_follow_the_clipped_lengths_and_are_used_at_once():
    head, feature, weight, label = set_up(AdaFace)
    mean, std = 20.0, 100.0
    for factor in (1.0, 0.5, 1e-6):
        lengths = [min(max(z.norm().item() * factor, 0.001), 100) for z in feature]
        average = sum(lengths) / 6
        deviation = math.sqrt(sum((a - average) ** 2 for a in lengths) / 5)
        mean, std = 0.01 * average + 0.99 * mean, 0.01 * deviation + 0.99 * std
        logits = head(feature * factor, label)
        expected = plain_adaface(feature * factor, weight, label, mean, std)
        torch.testing.assert_close(logits, expected)
        assert statistics(head) == pytest.approx({"batch_mean": mean, "batch_std": std})


def test_adaface_is_arcface_at_low_quality_and_cosface_at_the_mean():
    head, feature, weight, label = set_up(AdaFace)
    head.eval()
    for cls, mean in ((ArcFace, 1e6), (CosFace, 12.0)):
        head.batch_mean.fill_(mean)
        other = cls(5, 7, margin=0.4).double()
        other.weight.data.copy_(weight)
        # the fourth row has length 12, and a target that is not beyond pi - m
        torch.testing.assert_close(head(feature[3:4], label[3:4]), other(feature[3:4], label[3:4]))


@pytest.mark.parametrize("head_type", [CurricularFace, AdaFace])
def test_statistics_stand_still_in_eval_mode_and_without_a_label(head_type):
    head, feature, _, label = set_up(head_type)
    head(feature, label)
    before = statistics(head)
    head(feature)
    assert statistics(head) == before
    head.eval()(feature, label)
    assert statistics(head) == before
    head.train()(feature, label)
    assert all(value != before[name] for name, value in statistics(head).items())


@pytest.mark.parametrize("head_type", [CurricularFace, AdaFace])
@pytest.mark.parametrize("value", [math.nan, 1e30, 0.0])
def test_extreme_features_never_poison_the_statistics(head_type, value):
    head, feature, _, label = set_up(head_type, torch.float32)
    before = statistics(head)
    feature[2] = value
    head(feature, label)
    after = statistics(head)
    assert all(math.isfinite(v) for v in after.values())
    assert (after == before) == math.isnan(value)


def test_adaface_statistics_ignore_a_batch_of_one():
    head, feature, weight, label = set_up(AdaFace)
    logits = head(feature[:1], label[:1])
    assert statistics(head) == {"batch_mean": 20.0, "batch_std": 100.0}
    torch.testing.assert_close(logits, plain_adaface(feature[:1], weight, label[:1], 20.0, 100.0))


@pytest.mark.parametrize("head_type", [CurricularFace, MagFace, AdaFace])
@pytest.mark.parametrize("length", [0.0, 1e-8, 1e18])
@pytest.mark.parametrize("rows", [1, 3])
def test_extreme_lengths_give_finite_logits_and_gradients(head_type, length, rows):
    head, feature, _, label = set_up(head_type, torch.float32)
    z = (F.normalize(feature[:rows]) * length).requires_grad_()
    logits = head(z, label[:rows])
    (F.cross_entropy(logits, label[:rows]) + head.penalty).backward()
    assert logits.isfinite().all() and head.penalty.isfinite()
    assert z.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_magface_penalty_is_of_the_last_call_and_pulls_the_features():
    head, feature, _, label = set_up(MagFace)
    z = feature.requires_grad_()
    head(z, label)
    (grad,) = torch.autograd.grad(head.penalty, z)
    a = feature.norm(dim=1, keepdim=True)
    inside = (a > 10) & (a < 110)
    expected = torch.where(inside, 35 / 6 * (1 / 110**2 - 1 / a**2) * feature / a, 0.0)
    torch.testing.assert_close(grad, expected)
    assert inside.any() and not inside.all()
    copies = copy.deepcopy(head), pickle.loads(pickle.dumps(head))
    assert all(c.penalty.item() == head.penalty.item() for c in copies)
    head(z)
    assert head.penalty.item() == 0 and not head.penalty.requires_grad


@pytest.mark.parametrize("head_type", [CurricularFace, AdaFace])
def test_gathered_statistics_are_those_of_the_global_batch(head_type):
    whole, feature, weight, label = set_up(head_type)
    logits = whole(feature, label)
    seen = []
    alone = head_type(5, 7, gather=lambda local: seen.append(local) or local).double()
    alone.weight.data.copy_(weight)
    alone(feature, label)  # what a rank with everything would send
    parts = []
    for rank in (slice(0, 1), slice(1, 6)):
        head = head_type(5, 7, gather=lambda local: seen[0]).double()
        head.weight.data.copy_(weight)
        parts.append(head(feature[rank], label[rank]))
        assert statistics(head) == statistics(whole)
    torch.testing.assert_close(torch.cat(parts), logits)


@pytest.mark.parametrize("head_type", EVERY)
def test_a_resumed_head_goes_on_with_the_same_bits(head_type):
    head, feature, _, label = set_up(head_type, torch.float32)
    head(feature, label)
    resumed = head_type(5, 7)
    resumed.load_state_dict(head.state_dict())
    assert torch.equal(resumed(feature, label), head(feature, label))
    for name, value in head.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert set(head.state_dict()) - {"weight"} == {
        CurricularFace: {"t"},
        AdaFace: {"batch_mean", "batch_std"},
    }.get(head_type, set())


def test_defaults_of_the_statistical_heads_are_the_published_ones():
    curricular, mag, ada = CurricularFace(4, 3), MagFace(4, 3), AdaFace(4, 3)
    assert (curricular.scale, curricular.margin, curricular.t.item()) == (64, 0.5, 0)
    assert (mag.scale, mag.margin, mag.margin_max) == (64, 0.45, 0.8)
    assert (mag.a_min, mag.a_max, mag.regulariser) == (10, 110, 35)
    assert (ada.scale, ada.margin, ada.h) == (64, 0.4, 0.333)


def test_bad_settings_of_the_statistical_heads_are_clear_errors():
    with pytest.raises(ValueError, match="margin_max is 0.2"):
        MagFace(4, 3, margin_max=0.2)
    with pytest.raises(ValueError, match="0 < a_min < a_max"):
        MagFace(4, 3, a_min=120.0)
    for h in (0.0, math.nan):
        with pytest.raises(ValueError, match="h is"):
            AdaFace(4, 3, h=h)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts host syncs of a GPU")
@pytest.mark.parametrize("head_type", EVERY)
def test_a_cuda_step_never_waits_for_the_device(head_type):
    head = head_type(16, 9).cuda()
    feature, label = torch.randn(5, 16, device="cuda"), torch.arange(5, device="cuda")
    head(feature, label).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(feature, label).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("head", EVERY)
def test_a_pair_is_the_logits_with_and_without_label(head: type) -> None:
    torch.manual_seed(0)
    one, two = head(7, 5), head(7, 5)
    two.load_state_dict(one.state_dict())
    feature = torch.randn(6, 7, requires_grad=True)
    label = torch.tensor([0, 1, 2, 3, 4, 0])
    margin, plain = one.pair(feature, label)
    assert torch.equal(plain, two(feature))
    assert torch.equal(margin, two(feature, label))
    assert torch.equal(one.penalty, two.penalty)  # MagFace's is that of the call with a label
    weights = torch.randn_like(margin), torch.randn_like(margin)
    (weights[0] * margin + weights[1] * plain).sum().backward()
    assert feature.grad is not None
    both = feature.grad.clone()
    feature.grad = None
    two.load_state_dict(head(7, 5).state_dict() | {"weight": one.weight.detach()})
    (weights[0] * two(feature, label)).sum().backward()
    (weights[1] * two(feature)).sum().backward()
    torch.testing.assert_close(feature.grad, both, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.weight.grad, one.weight.grad, rtol=1e-4, atol=1e-4)
