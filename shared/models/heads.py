"""Margin heads for face embeddings: a weight per identity, a margin on the target's cosine.

A head maps (feature [B, dim], label [B]) to logits [B, classes] for cross-entropy, and with no
label to the margin-free scale * cosine, which is what knowledge distillation compares. Its
regulariser of the last call is in `penalty`, a scalar tensor that the loop adds and logs (0 for
the heads of this file). Logits are float32 or wider whatever autocast says: bf16 has a cosine
step of .004 near 1, which times scale 64 is a quarter of a logit.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Module):
    """Scaled cosines to the class weights; `with_margin` changes the target's.

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

    def with_margin(self, cosine: Tensor) -> Tensor:
        """The target's cosine [B, 1] -> what stands in its place [B, 1]."""
        raise NotImplementedError

    def forward(self, feature: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits [B, classes] of feature [B, dim]; label [B] int64, or None for no margin.

        Raises ValueError for shapes that do not fit and, with labels on the CPU, for a label
        outside [0, classes). On a GPU that check would make the host wait for the device at every
        step; there the gather itself asserts.
        """
        if feature.ndim != 2 or feature.shape[1] != self.dim:
            raise ValueError(f"expected features [B, {self.dim}], got {list(feature.shape)}")
        dtype = torch.promote_types(feature.dtype, self.weight.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        with torch.autocast(feature.device.type, enabled=False):
            weight = F.normalize(self.weight.to(dtype))
            cosine = F.linear(F.normalize(feature.to(dtype)), weight)
            if label is None:
                return self.scale * cosine
            self._check_label(label, len(feature))
            index = label.unsqueeze(1)
            target = self.with_margin(cosine.gather(1, index))
            return self.scale * cosine.scatter(1, index, target)

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

    # Where float32 cannot tell c from +-1 the root's slope is infinite: it is held here instead.
    SQUARED_SINE_MIN = 1e-7

    def __init__(self, dim: int, classes: int, *, scale: float = 64.0, margin: float = 0.5) -> None:
        super().__init__(dim, classes, scale=scale, margin=margin)

    def with_margin(self, cosine: Tensor) -> Tensor:
        sine = (1 - cosine * cosine).clamp(min=self.SQUARED_SINE_MIN).sqrt()
        shifted = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        fallback = cosine - self.margin * math.sin(self.margin)
        return torch.where(cosine > math.cos(math.pi - self.margin), shifted, fallback)


class CosFace(CosineHead):
    """s * (cos(theta) - m) for the target class (Wang et al. 2018, Eq. 4).

    The default margin is .4 (some public code uses .35).
    """

    def __init__(self, dim: int, classes: int, *, scale: float = 64.0, margin: float = 0.4) -> None:
        super().__init__(dim, classes, scale=scale, margin=margin)

    def with_margin(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin
