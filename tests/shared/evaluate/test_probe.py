import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from shared.evaluate.probe import TOLERANCE, linear_probe


def features(n, dim=6, classes=4, spread=1.0, seed=0):
    """Overlapping clusters in a slanted space: columns of very different scale and mean."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centre = np.random.default_rng(99).normal(size=(classes, dim))
    x = centre[labels] + spread * rng.normal(size=(n, dim))
    return x * np.logspace(-1, 1, dim) + np.arange(dim), labels


TRAIN, TEST = features(800), features(400, seed=1)


def test_weights_are_those_of_scikit_learn():
    (x, y), decay = TRAIN, 0.02
    mean, scale = x.mean(axis=0), x.std(axis=0)
    # 1 / 2 |W|^2 + C sum of losses, divided by N C.
    other = LogisticRegression(C=1 / (len(x) * decay), tol=1e-10, max_iter=5000)
    other.fit((x - mean) / scale, y)
    ours = linear_probe(x, y, *TEST, classes=4, weight_decay=decay)
    assert np.allclose(ours.weight.numpy() * scale, other.coef_, atol=2e-3)
    logits = (TEST[0] - mean) / scale @ other.coef_.T + other.intercept_
    assert ours.test.top[1] == (logits.argmax(axis=1) == TEST[1]).mean()
    assert ours.gradient <= TOLERANCE


def test_without_decay_the_gradient_of_the_given_features_vanishes():
    (x, y), ours = TRAIN, linear_probe(*TRAIN, *TEST, classes=4)
    weight, bias = ours.weight.numpy(), ours.bias.numpy()
    gradient, loss = np.zeros((4, x.shape[1] + 1)), 0.0
    for f, label in zip(x, y, strict=True):
        z = np.exp(weight @ f + bias)
        p = z / z.sum()
        loss -= np.log(p[label]) / len(x)
        p[label] -= 1
        gradient += np.outer(p, np.append(f, 1)) / len(x)
    assert np.abs(gradient).max() < 20 * TOLERANCE  # the largest column's scale is 10
    assert ours.loss == pytest.approx(loss)


def test_scores_are_those_of_the_returned_layer_on_the_test_features_alone():
    ours = linear_probe(*TRAIN, *TEST, classes=4)
    logits = TEST[0] @ ours.weight.numpy().T + ours.bias.numpy()
    assert (ours.test.correct == (logits.argmax(axis=1) == TEST[1])).all()
    assert 0.6 < ours.test.top[1] < 0.95
    other = linear_probe(*TRAIN, TEST[0][:50] + 3, TEST[1][:50], classes=4)
    assert torch.equal(ours.weight, other.weight)  # nothing is learned from what is tested


def test_scale_and_offset_of_the_features_change_nothing():
    ours = linear_probe(*TRAIN, *TEST, classes=4)
    moved = [(1000 * x - 5, y) for x, y in (TRAIN, TEST)]
    again = linear_probe(*moved[0], *moved[1], classes=4)
    assert (ours.test.correct == again.test.correct).all()
    assert torch.allclose(ours.weight, 1000 * again.weight, atol=1e-4)


def test_two_calls_give_the_same_bits_also_inside_no_grad():
    x, y = torch.tensor(TRAIN[0]).float(), torch.tensor(TRAIN[1])
    a = linear_probe(x, y, *TEST, classes=4)
    with torch.no_grad():
        b = linear_probe(x, y, *TEST, classes=4)
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)
    assert a.weight.dtype == torch.float32 and a.gradient <= TOLERANCE


def test_classes_that_can_be_separated_end_at_the_tolerance():
    # As UCCS is: 180 ways, and more features than images of a person.
    x, y = features(720, dim=256, classes=180, spread=0.3)
    test = features(360, dim=256, classes=180, spread=0.3, seed=1)
    ours = linear_probe(x, y, *test, classes=180)
    assert ours.loss < 0.01 and ours.gradient <= TOLERANCE
    assert ours.test.top[1] > 0.95 and ours.test.top[5] >= ours.test.top[1]


def test_a_constant_feature_counts_for_nothing():
    constant = [(np.c_[x, np.full(len(x), 0.1, np.float32)], y) for x, y in (TRAIN, TEST)]
    ours = linear_probe(*constant[0], *constant[1], classes=4)
    plain = linear_probe(*TRAIN, *TEST, classes=4)
    assert (ours.test.correct == plain.test.correct).all()
    assert torch.equal(ours.weight[:, -1], torch.zeros(4).double())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(classes=5), "train_labels: no example of 1 classes, first 4"),
        (dict(classes=3), "train_labels: range 0 to 3, classes=3"),
        (dict(classes=1), "classes=1"),
        (dict(weight_decay=-1), "weight_decay=-1"),
        (dict(train_labels=TRAIN[1][1:]), "train_labels: int64 of shape .799,., needs 800"),
        (dict(test_labels=TEST[1] + 0.5), "test_labels: float64"),
        (dict(test_labels=TEST[1] - 1), "test_labels: range -1"),
        (dict(test_features=TEST[0][:, 1:]), "widths differ"),
        (dict(train_features=np.where(TRAIN[0] > 20, np.nan, TRAIN[0])), "train_features: NaN"),
    ],
)
def test_bad_input_is_refused(change, words):
    given = dict(
        train_features=TRAIN[0], train_labels=TRAIN[1],
        test_features=TEST[0], test_labels=TEST[1], classes=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=words):
        linear_probe(**(given | change))
