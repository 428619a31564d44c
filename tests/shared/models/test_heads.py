import math

import pytest
import torch
import torch.nn.functional as F

from shared.models.heads import ArcFace, CosFace

HEADS = [
    (ArcFace, 64.0, 0.5),
    (ArcFace, 16.0, 1.2),
    (CosFace, 64.0, 0.4),
    (CosFace, 16.0, 0.2),
]


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


@pytest.mark.parametrize("head_type", [ArcFace, CosFace])
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


@pytest.mark.parametrize("head_type", [ArcFace, CosFace])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_cosine_exactly_one_and_minus_one(head_type, sign, dtype):
    head = head_type(4, 4).to(dtype)
    head.weight.data.copy_(torch.eye(4))
    feature = (sign * torch.eye(4, dtype=dtype)).requires_grad_()
    label = torch.arange(4)
    assert torch.equal(head(feature).diagonal(), torch.full((4,), 64 * sign, dtype=dtype))
    F.cross_entropy(head(feature, label), label).backward()
    assert feature.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_arcface_at_cosine_one_is_within_the_clamp_of_cos_m():
    head = ArcFace(2, 2)
    head.weight.data.copy_(torch.eye(2))
    logit = head(torch.eye(2), torch.arange(2))[0, 0].item()
    assert logit == pytest.approx(64 * math.cos(0.5), abs=64 * math.sin(0.5) * 1e-7**0.5 + 1e-4)


@pytest.mark.parametrize("head_type", [ArcFace, CosFace])
def test_logits_are_float32_under_bf16_autocast_and_with_bf16_features(head_type):
    torch.manual_seed(0)
    head = head_type(16, 9)
    feature, label = torch.randn(5, 16), torch.arange(5)
    expected = head(feature, label)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(feature, label)
        assert head(feature.bfloat16(), label).dtype == torch.float32
        assert head(feature).dtype == torch.float32
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("head_type", [ArcFace, CosFace])
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts host syncs of a GPU")
@pytest.mark.parametrize("head_type", [ArcFace, CosFace])
def test_a_cuda_step_never_waits_for_the_device(head_type):
    head = head_type(16, 9).cuda()
    feature, label = torch.randn(5, 16, device="cuda"), torch.arange(5, device="cuda")
    head(feature, label).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(feature, label).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
