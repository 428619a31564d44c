"""Small embedding networks: those of the embedded data, which train in seconds on two CPU cores,
and HORKD's slim ResNet34."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch.nn.functional as F
from torch import Tensor, nn

from shared.models.cifar import BasicBlock


class SmallNet(nn.Module):
    """3x3 stem, one residual block a stage, flatten, linear, BN: an embedding, no classifier.

    The last map is flattened, not averaged: where a mole sits is part of the identity, and global
    average pooling was measurably worse on the embedded faces.

    The face is that of every network: `features(x)` [B, 3, size, size] -> [B, dim], `forward(x)`
    -> (embedding, maps "stem", "stage1", ... [B, C, h, w]), `dim`; `classes` is None, because a
    margin head (`shared.models.heads`) turns the embedding into logits.

    size: side of the square input in pixels, at least 4; the flattened length depends on it.
    widths, strides: channels and stride of each stage; stem, stem_stride: those of the stem.
    Raises ValueError for a size below 4 or for widths and strides of different length.
    """

    classes = None
    fixed: tuple[str, ...] = ()
    """Parameters that no training changes."""

    def __init__(
        self,
        size: int,
        widths: Sequence[int],
        stem: int,
        stem_stride: int,
        dim: int = 128,
        *,
        strides: Sequence[int] = (2, 2, 2),
    ) -> None:
        super().__init__()
        if size < 4:
            raise ValueError(f"size is {size}: a SmallNet needs inputs of at least 4 pixels a side")
        if len(widths) != len(strides):
            raise ValueError(
                f"{len(widths)} widths but {len(strides)} strides: give one of each per stage"
            )
        self.size = size
        self.dim = dim
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(),
        )
        self.stages = nn.ModuleList()
        side, c_in = -(-size // stem_stride), stem  # a padded 3x3 rounds the side up
        for width, stride in zip(widths, strides, strict=True):
            self.stages.append(BasicBlock(c_in, width, stride))
            side, c_in = -(-side // stride), width
        self.linear = nn.Linear(c_in * side * side, dim, bias=False)  # the BN has the bias
        self.bn = nn.BatchNorm1d(dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def head(self, x: Tensor) -> Tensor:
        """The last map [B, C, h, w] -> embedding [B, dim]."""
        return self.bn(self.linear(x.flatten(1)))

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, size, size] -> [B, dim]; ValueError for another size."""
        return self(x)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, 3, size, size] -> ([B, dim], maps); ValueError for another size."""
        if x.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"expected images [B, 3, {self.size}, {self.size}], got {list(x.shape)}: "
                "resize them or create the network with that size"
            )
        maps = {"stem": self.stem(x)}
        out = maps["stem"]
        for i, stage in enumerate(self.stages, start=1):
            out = maps[f"stage{i}"] = stage(out)
        return self.head(out), maps

    def classify(self, embedding: Tensor) -> NoReturn:
        """Raises ValueError: an embedding network has no classifier of its own."""
        raise ValueError(
            "SmallNet has no classifier: use a head of shared.models.heads, such as CosFace"
        )


class SlimResNet34(nn.Module):
    """HORKD's assistant and student: a ResNet34 (3-4-6-3 basic blocks) of reduced widths.

    The paper gives its size, 7.8M parameters, and no width: `width` 38 in the first stage, doubled
    in each later one, has 7.66M with the 512-d embedding (39 without it: 7.91M), so it is an
    approximation. Ours too: a 3x3 stem at stride 1 without a pool, so that 16x16 images keep a 2x2
    map at the end (ImageNet's 7x7 stem: 7.67M), and global average pooling, so that one set of
    weights takes images of any size.

    The face is that of `SmallNet`, with maps "stem", "stage1" ... "stage4" (1, 1, 1/2, 1/4, 1/8 of
    the input's side). The embedding is raw.
    """

    classes = None

    def __init__(self, *, width: int = 38, dim: int = 512) -> None:
        super().__init__()
        self.dim = dim
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        c_in = width
        for i, blocks in enumerate((3, 4, 6, 3)):
            c_out = width * 2**i
            first = BasicBlock(c_in, c_out, 2 if i else 1)
            rest = (BasicBlock(c_out, c_out) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(first, *rest))
            c_in = c_out
        self.embedding = nn.Linear(c_in, dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, dim], not normalised."""
        return self(x)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, 3, H, W] -> ([B, dim], maps)."""
        maps = {"stem": self.stem(x)}
        out = maps["stem"]
        for i, stage in enumerate(self.stages, start=1):
            out = maps[f"stage{i}"] = stage(out)
        return self.embedding(F.adaptive_avg_pool2d(out, 1).flatten(1)), maps

    def classify(self, embedding: Tensor) -> NoReturn:
        """Raises ValueError: an embedding network has no classifier of its own."""
        raise ValueError(
            "SlimResNet34 has no classifier: use a head of shared.models.heads, such as CosFace"
        )


# The SmallNets end in a 4x4 map at their own size: 565,264 (teacher) and 208,720 parameters
# (student). The .62M and .26M of the prototype are these networks with its 400-identity head
# (51,200 weights) counted in. small-assistant is HORKD's on the embedded data: the student for
# images four times as large. Strides alone differ, so all its weights have the student's shapes,
# but that its first block has a shortcut of its own.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "small-teacher": partial(
        SmallNet, size=64, widths=(32, 64, 128), stem=16, stem_stride=2, strides=(2, 2, 2)
    ),
    "small-student": partial(
        SmallNet, size=16, widths=(16, 32, 64), stem=16, stem_stride=1, strides=(1, 2, 2)
    ),
    "small-assistant": partial(
        SmallNet, size=64, widths=(16, 32, 64), stem=16, stem_stride=2, strides=(2, 2, 2)
    ),
    "slim-resnet34": SlimResNet34,
}
