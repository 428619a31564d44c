"""What HORKD adds to the networks, for training only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.config import Data
from shared.models.recogniser import Recogniser


class Projector(nn.Module):
    """g [B, D_s] -> [B, D_t], for L1 and L_C where the sizes differ; nothing where they agree.

    The paper is silent on ResNet50's 2048 numbers against ResNet18's 512: a linear layer, thrown
    away after training. L2 and L3 compare distances and angles, which need none.
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        same = student == teacher
        self.linear = nn.Identity() if same else nn.Linear(student, teacher, bias=False)

    def forward(self, g: Tensor) -> Tensor:
        return self.linear(g)


class Regressor(nn.Module):
    """FitNet's: a 1x1 convolution and a ReLU, from the student's channels to the teacher's.

    forward: maps of student and teacher by name [B, C, h, w] -> (regressed student map, teacher
    map), the larger averaged to the size of the smaller.
    """

    STAGE = "stage2"  # the middle of three or four, as in RepDistiller

    def __init__(self, student: Recogniser, teacher: Recogniser, data: Data) -> None:
        super().__init__()
        narrow, wide = channels(student, data.lr_input), channels(teacher, data.hr)
        self.conv = nn.Conv2d(narrow[self.STAGE], wide[self.STAGE], 1)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        made = F.relu(self.conv(student[self.STAGE].float()))
        wanted = teacher[self.STAGE].float()
        size = min(made.shape[2], wanted.shape[2]), min(made.shape[3], wanted.shape[3])
        return F.adaptive_avg_pool2d(made, size), F.adaptive_avg_pool2d(wanted, size)


@torch.no_grad()
def channels(recogniser: Recogniser, size: int) -> dict[str, int]:
    """Channels of each map, found by one image."""
    weight = next(recogniser.parameters())
    training = recogniser.training
    _, maps = recogniser.eval()(torch.zeros(1, 3, size, size, device=weight.device), maps=True)
    recogniser.train(training)
    return {name: map_.shape[1] for name, map_ in maps.items()}
