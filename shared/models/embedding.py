"""Small embedding networks for the embedded data: they train in seconds on two CPU cores."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

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
        return self.bn(self.linear(out.flatten(1))), maps

    def classify(self, embedding: Tensor) -> NoReturn:
        """Raises ValueError: an embedding network has no classifier of its own."""
        raise ValueError(
            "SmallNet has no classifier: use a head of shared.models.heads, such as CosFace"
        )


# Both end in a 4x4 map at their own size: 565,264 and 208,720 parameters. The .62M and .26M of the
# prototype are these networks with its 400-identity head (51,200 weights) counted in.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "small-teacher": partial(
        SmallNet, size=64, widths=(32, 64, 128), stem=16, stem_stride=2, strides=(2, 2, 2)
    ),
    "small-student": partial(
        SmallNet, size=16, widths=(16, 32, 64), stem=16, stem_stride=1, strides=(1, 2, 2)
    ),
}
