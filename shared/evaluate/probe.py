"""A linear classifier on frozen features: the linear probe and the fine-tuned last layer.

CRRCD Table IV (the student of CIFAR-100 on STL10 and TinyImageNet, after CRD), CRRCD Table VI and
HORKD Table 3 (a 180-way layer on UCCS). The features are those of the network in `eval()`, batch
norm frozen, and make up all that is known of it here.

The papers give neither optimiser nor schedule nor initialisation of this layer, and no weight decay
is applied. The problem is convex, so it is solved instead of tuned: softmax regression, full batch,
L-BFGS. A rate that suits the scale of one network's features would favour that network: on
synthetic features, SGD with momentum over 100 epochs differed by 7 points of test accuracy between
rates of .01 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from shared.evaluate.classify import Classification, classification
from shared.evaluate.intervals import as_array
from shared.evaluate.verify import embedding_rows

TOLERANCE = 1e-5  # of the largest entry of the gradient, features having deviation 1
ITERATIONS = 1000  # some 100 are needed; 20 or 30 where the classes can be separated


@dataclass(frozen=True, eq=False)
class Probe:
    test: Classification
    weight: Tensor  # [C, D], for the features as given
    bias: Tensor  # [C]
    loss: float  # cross-entropy on the training features
    gradient: float  # its largest entry at the end: at most TOLERANCE, or not converged


def linear_probe(
    train_features: Tensor | ArrayLike,
    train_labels: Tensor | ArrayLike,
    test_features: Tensor | ArrayLike,
    test_labels: Tensor | ArrayLike,
    *,
    classes: int,
    weight_decay: float = 0.0,
) -> Probe:
    """Fit softmax(W f + b) to train features [N, D], score it on test features [M, D].

    Labels [N], [M] are integers in [0, classes). Minimised over W and b from zero, with f' the
    features shifted and scaled to mean 0 and deviation 1 on the training set,
        mean cross-entropy + weight_decay / 2 |W'|^2,   W f + b = W' f' + b',
    until the largest entry of the gradient is at most 1e-5. Without weight decay (as in the papers)
    f' only speeds this up; it also makes the result the same for features on any scale. Where the
    training classes can then be separated there is no minimum, the loss goes to 0, and the
    tolerance decides where to stop: it is part of the protocol.

    Deterministic. On the CPU, products in the type of the training features (float32 at least).
    Memory: a copy of them, and logits [N, C]. Cost: 2 N D C multiply-adds for each of some 100
    steps; TinyImageNet (100,000 x 960, 200 classes) takes minutes on one thread.

    ValueError: shapes that do not fit, features that are NaN or infinite, labels out of range, a
    class without training example, classes < 2, weight_decay < 0.
    """
    if classes < 2:
        raise ValueError(f"classes={classes}: must be at least 2")
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay}: must be at least 0")
    train, y = _features(train_features, train_labels, classes, "train")
    test, truth = _features(test_features, test_labels, classes, "test")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train {tuple(train.shape)} and test {tuple(test.shape)}: widths differ")
    absent = torch.bincount(y, minlength=classes).eq(0).nonzero().flatten().tolist()
    if absent:
        raise ValueError(f"train_labels: no example of {len(absent)} classes, first {absent[0]}")

    mean = train.mean(0)
    x = train - mean
    scale = torch.linalg.vector_norm(x, dim=0) / len(x) ** 0.5
    scale[scale <= torch.finfo(x.dtype).eps * mean.abs()] = 1  # constant, but for rounding
    x /= scale
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    lbfgs = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def cross_entropy() -> Tensor:
        # In float64: the search for a step compares losses that agree to seven digits.
        return F.cross_entropy((x @ weight.T + bias).double(), y)

    def objective() -> Tensor:
        lbfgs.zero_grad()
        loss = cross_entropy() + 0.5 * weight_decay * weight.double().square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        lbfgs.step(objective)
        objective()
    gradient = max(float(p.grad.abs().max()) for p in (weight, bias) if p.grad is not None)
    with torch.no_grad():
        loss = float(cross_entropy())
        weight = weight / scale
        bias = bias - weight @ mean
        logits = test.to(weight) @ weight.T + bias
    return Probe(classification(logits, truth), weight, bias, loss, gradient)


def _features(
    features: Tensor | ArrayLike, labels: Tensor | ArrayLike, classes: int, name: str
) -> tuple[Tensor, Tensor]:
    """Features [N, D] in float32 or float64 and labels int64 [N], checked."""
    x = torch.from_numpy(embedding_rows(features, f"{name}_features", zeros=True))
    y = as_array(labels)
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise ValueError(f"{name}_labels: {y.dtype} of shape {y.shape}, needs {len(x)} integers")
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"{name}_labels: range {y.min()} to {y.max()}, classes={classes}")
    return x, torch.from_numpy(y.astype("int64"))
