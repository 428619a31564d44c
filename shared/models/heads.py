"""Margin heads for face embeddings: a weight per identity, a margin on the target's cosine.

A head maps (feature [B, dim], label [B]) to logits [B, classes] for cross-entropy, and with no
label to the margin-free scale * cosine, which is what knowledge distillation compares. Its
regulariser of the last call is in `penalty`, a scalar tensor that the loop adds and logs: MagFace
has one, elsewhere it is 0. Logits are float32 or wider whatever autocast says: bf16 has a cosine
step of .004 near 1, which times scale 64 is a quarter of a logit.

CurricularFace and AdaFace keep running statistics in their state dict. They move in training mode
and under a label only, by this process's batch as in the authors' code; `gather=run.gather` makes
them those of the global batch: the same on every rank, and the same for any number of ranks.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gather = Callable[[Tensor], Tensor]  # [B, ...] of this rank -> those of all ranks, no gradient

# Where float32 cannot tell a cosine from +-1 the sine's slope is infinite: it is held here instead.
SQUARED_SINE_MIN = 1e-7

STATISTICS_STEP = 0.01  # a batch's share in running statistics


class CosineHead(nn.Module):
    """Scaled cosines to the class weights; `with_margin` changes the target's, `others` the rest.

    weight: [classes, dim], drawn with standard deviation .01 as in InsightFace; only its direction
    counts, but its length sets how far a step of SGD turns it.
    """

    penalty: Tensor

    def __init__(self, dim: int, classes: int, *, scale: float, margin: float) -> None:
        super().__init__()
        if dim < 1 or classes < 1:
            raise ValueError(f"dim is {dim} and classes {classes}: a head needs at least 1 of each")
        if not scale > 0:
            raise ValueError(f"scale is {scale}: it must be positive")
        if not 0 <= margin < math.pi:
            raise ValueError(f"margin is {margin}: it must be in [0, pi)")
        self.dim = dim
        self.classes = classes
        self.scale = scale
        self.margin = margin
        self.weight = nn.Parameter(torch.empty(classes, dim).normal_(std=0.01))
        self.register_buffer("penalty", torch.zeros(()), persistent=False)

    def with_margin(self, cosine: Tensor, feature: Tensor) -> Tensor:
        """The target's cosine [B, 1], and feature [B, dim] -> what stands in its place [B, 1]."""
        raise NotImplementedError

    def others(self, cosine: Tensor, target: Tensor) -> Tensor:
        """All cosines [B, classes], and the target's [B, 1] -> what the other classes get."""
        return cosine

    def forward(self, feature: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits [B, classes] of feature [B, dim]; label [B] int64, or None for no margin.

        Raises ValueError for shapes that do not fit and, with labels on the CPU, for a label
        outside [0, classes). On a GPU that check would make the host wait for the device at every
        step; there the gather itself asserts.
        """
        cosine = self.cosines(feature)
        return self.scale * cosine if label is None else self._changed(cosine, feature, label)

    def pair(self, feature: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Logits with the margin and without it, as `forward` gives them, of one set of cosines."""
        cosine = self.cosines(feature)
        return self._changed(cosine, feature, label), self.scale * cosine

    def cosines(self, feature: Tensor) -> Tensor:
        """[B, classes] of feature [B, dim]. Divides products by lengths, which are fewer numbers
        than the weights; raises ValueError for features of another shape."""
        if feature.ndim != 2 or feature.shape[1] != self.dim:
            raise ValueError(f"expected features [B, {self.dim}], got {list(feature.shape)}")
        with torch.autocast(feature.device.type, enabled=False):
            feature = feature.to(self._dtype(feature))
            weight = self.weight.to(feature.dtype)
            length = weight.norm(dim=1).clamp(min=1e-12)
            return F.linear(F.normalize(feature), weight) / length

    def _changed(self, cosine: Tensor, feature: Tensor, label: Tensor) -> Tensor:
        """Scaled cosines with the margin."""
        self._check_label(label, len(feature))
        with torch.autocast(feature.device.type, enabled=False):
            index = label.unsqueeze(1)
            target = cosine.gather(1, index)
            changed = self.with_margin(target, feature.to(self._dtype(feature)))
            return self.scale * self.others(cosine, target).scatter(1, index, changed)

    def _dtype(self, feature: Tensor) -> torch.dtype:
        dtype = torch.promote_types(feature.dtype, self.weight.dtype)
        return torch.promote_types(dtype, torch.float32)

    def _check_label(self, label: Tensor, batch: int) -> None:
        if label.shape != (batch,) or label.dtype != torch.int64:
            raise ValueError(
                f"expected int64 labels [{batch}], got {label.dtype} {list(label.shape)}"
            )
        if label.device.type == "cpu" and batch:
            low, high = int(label.min()), int(label.max())
            if low < 0 or high >= self.classes:
                raise ValueError(
                    f"labels run from {low} to {high}, but the head has classes "
                    f"0 to {self.classes - 1}: relabel the data or make the head larger"
                )


class ArcFace(CosineHead):
    """s * cos(theta + m) for the target class (Deng et al. 2019, Eq. 3), m in radians.

    With c = cos(theta), cos(theta + m) = c cos(m) - sqrt(1 - c^2) sin(m). For theta >= pi - m it
    would rise again, so c - m sin(m) stands there, the fallback of the authors' code.
    """

    def __init__(self, dim: int, classes: int, *, scale: float = 64.0, margin: float = 0.5) -> None:
        super().__init__(dim, classes, scale=scale, margin=margin)

    def shifted(self, cosine: Tensor) -> Tensor:
        """cos(theta + m)."""
        return cosine * math.cos(self.margin) - _sine(cosine) * math.sin(self.margin)

    def with_margin(self, cosine: Tensor, feature: Tensor) -> Tensor:
        fallback = cosine - self.margin * math.sin(self.margin)
        falling = cosine > math.cos(math.pi - self.margin)
        return torch.where(falling, self.shifted(cosine), fallback)


class CosFace(CosineHead):
    """s * (cos(theta) - m) for the target class (Wang et al. 2018, Eq. 4).

    The default margin is .4 (some public code uses .35).
    """

    def __init__(self, dim: int, classes: int, *, scale: float = 64.0, margin: float = 0.4) -> None:
        super().__init__(dim, classes, scale=scale, margin=margin)

    def with_margin(self, cosine: Tensor, feature: Tensor) -> Tensor:
        return cosine - self.margin


class CurricularFace(ArcFace):
    """ArcFace whose hard negatives, cos_j > cos(theta_y + m), become cos_j (t + cos_j).

    Huang et al. 2020: t starts at 0 and follows the mean cosine of the targets, so that hard
    negatives count for less at first and for more later; no gradient runs through it. A batch
    moves t before it is scored by it, as in the authors' code (the paper's algorithm moves it
    after: a lag of one batch in an average over a hundred).
    """

    t: Tensor

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        scale: float = 64.0,
        margin: float = 0.5,
        gather: Gather | None = None,
    ) -> None:
        super().__init__(dim, classes, scale=scale, margin=margin)
        self.gather = gather
        self.register_buffer("t", torch.zeros(()))

    def others(self, cosine: Tensor, target: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                every = target if self.gather is None else self.gather(target)
                _follow(self.t, every.mean())
        hard = cosine > self.shifted(target)
        return torch.where(hard, cosine * (self.t + cosine), cosine)


class MagFace(CosineHead):
    """ArcFace with a margin that grows with the feature's length, and a pull on that length.

    Meng et al. 2021: with a = |z| held in [a_min, a_max], m(a) runs linearly from `margin` to
    `margin_max`, and penalty = regulariser * mean(a / a_max^2 + 1 / a), which is smallest at a_max.
    Easy margin: where cos(theta) <= 0 the cosine stays as it is. Gradients reach the length
    through both; outside [a_min, a_max] there is none.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        scale: float = 64.0,
        margin: float = 0.45,
        margin_max: float = 0.8,
        a_min: float = 10.0,
        a_max: float = 110.0,
        regulariser: float = 35.0,
    ) -> None:
        super().__init__(dim, classes, scale=scale, margin=margin)
        if not margin <= margin_max < math.pi:
            raise ValueError(f"margin_max is {margin_max}: it must be in [{margin}, pi)")
        if not 0 < a_min < a_max < math.inf:
            raise ValueError(f"lengths from {a_min} to {a_max}: expected 0 < a_min < a_max")
        self.margin_max = margin_max
        self.a_min = a_min
        self.a_max = a_max
        self.regulariser = regulariser

    def __getstate__(self) -> dict[str, object]:  # for copies: a tensor with a graph has none
        return {**self.__dict__, "_buffers": self._buffers | {"penalty": self.penalty.detach()}}

    def cosines(self, feature: Tensor) -> Tensor:
        self.penalty = torch.zeros_like(self.penalty)  # of this call, also where there is no label
        return super().cosines(feature)

    def with_margin(self, cosine: Tensor, feature: Tensor) -> Tensor:
        a = feature.norm(dim=1, keepdim=True).clamp(self.a_min, self.a_max)
        slope = (self.margin_max - self.margin) / (self.a_max - self.a_min)
        m = self.margin + slope * (a - self.a_min)
        self.penalty = self.regulariser * (a / self.a_max**2 + 1 / a).mean()
        shifted = cosine * m.cos() - _sine(cosine) * m.sin()
        return torch.where(cosine > 0, shifted, cosine)


class AdaFace(CosineHead):
    """s * (cos(theta - m q) - m (1 + q)) for the target class (Kim et al. 2022).

    q in [-1, 1] is the image's quality as the feature's length shows it: (|z| - mean) / (std / h),
    clipped, without gradient, with |z| in [.001, 100] and running mean and (unbiased) standard
    deviation of it, from 20 and 100 on as in the authors' code. q = -1 is ArcFace, 0 CosFace, 1 a
    negative angle. theta - m q is held in [0, pi] (they hold it, and the cosine, .001 inside).
    A batch of one image, or with a NaN in it, leaves the statistics as they are.
    """

    batch_mean: Tensor
    batch_std: Tensor

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        scale: float = 64.0,
        margin: float = 0.4,
        h: float = 0.333,
        gather: Gather | None = None,
    ) -> None:
        super().__init__(dim, classes, scale=scale, margin=margin)
        if not 0 < h < math.inf:
            raise ValueError(f"h is {h}: it must be positive")
        self.h = h
        self.gather = gather
        self.register_buffer("batch_mean", torch.tensor(20.0))
        self.register_buffer("batch_std", torch.tensor(100.0))

    def with_margin(self, cosine: Tensor, feature: Tensor) -> Tensor:
        quality = self._quality(feature)
        theta = torch.atan2(_sine(cosine), cosine)
        angular = (theta - self.margin * quality).clamp(0, math.pi).cos()
        return angular - self.margin * (1 + quality)

    @torch.no_grad()
    def _quality(self, feature: Tensor) -> Tensor:
        length = feature.norm(dim=1, keepdim=True).clamp(0.001, 100)
        if self.training:
            every = length if self.gather is None else self.gather(length)
            if len(every) > 1:  # one length has no deviation
                std, mean = torch.std_mean(every)
                _follow(self.batch_mean, mean)
                _follow(self.batch_std, std)
        return ((length - self.batch_mean) / (self.batch_std + 0.001) * self.h).clamp(-1, 1)


def _sine(cosine: Tensor) -> Tensor:
    return (1 - cosine * cosine).clamp(min=SQUARED_SINE_MIN).sqrt()


def _follow(running: Tensor, value: Tensor) -> None:
    """Move `running` towards a batch's value, in place; one that is not finite moves nothing."""
    moved = running + STATISTICS_STEP * (value.to(running.dtype) - running)
    running.copy_(torch.where(moved.isfinite(), moved, running))
