"""Face networks iresnet18/34/50/100 of InsightFace and ir18/34/50/101 of AdaFace: one class.

Modules, their names and the initial weights are those of InsightFace's arcface_torch
(https://github.com/deepinsight/insightface, recognition/arcface_torch/backbones/iresnet.py), so its
`backbone.pth` loads with `strict=True`: BN eps 1e-5, no activation after an addition.

AdaFace's (https://github.com/mk-minchul/AdaFace, net.py) differ in four things: where a unit keeps
its width, the shortcut picks every second pixel (a max pool of 1x1) and has no weights; the last
batch norm has no weight and bias; dropout .4 before the linear layer; other module names
(`adaface_names`) and BGR input, which `shared.models.checkpoints.load_backbone` both translates.
Its forward divides the embedding by its length; ours gives it raw, as everywhere in this tree.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn

from shared.kernels.dispatch import without_autocast

WIDTHS = (64, 128, 256, 512)
FULL = 112  # pixels a side of an aligned face


class Unit(nn.Module):
    """BN, 3x3, BN, PReLU, 3x3 (which carries the stride), BN, plus the shortcut; no activation.

    The shortcut is the identity where the shape stays, else 1x1 convolution + BN; or, with
    `pooled_shortcut`, every stride-th pixel where the width stays.
    """

    def __init__(
        self, c_in: int, c_out: int, stride: int = 1, *, pooled_shortcut: bool = False
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.prelu = nn.PReLU(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module = nn.Identity()
        if c_in == c_out and pooled_shortcut:
            self.downsample = nn.MaxPool2d(1, stride)
        elif c_in != c_out or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(out)) + self.downsample(x)


class IResNet(nn.Module):
    """3x3 stem at stride 1, four stages that each begin with stride 2, flatten, linear, BN.

    The face is that of every network: `features(x)` [B, 3, H, W] -> [B, dim], `forward(x)` ->
    (embedding, maps "stem", "stage1" ... "stage4" [B, C, h, w]), `dim`; `classes` is None, because
    a margin head (`shared.models.heads`) turns the embedding into logits. `stem`, `stages` and
    `head` are the parts of `forward`, for those who run it unit by unit.

    units, widths: number of units and of channels in each of the four stages; the stem has the
        channels of the first.
    input: what becomes of inputs that are not 112x112. "native": they are taken as they are, and
        the linear layer is built for the last map of size x size images, ceil(size / 16) a side (a
        padded 3x3 of stride 2 rounds up); other sizes are refused. "upsample": images of any size
        are resized to 112x112 (bilinear, antialiased where they are larger), and `size` is not
        looked at. A published checkpoint fits "upsample", or "native" at sizes 97 to 112.
    adaface: AdaFace's variant instead of InsightFace's; see the head of the file.
    state_dict() has the public name `features.*` for what named_parameters() calls
        `embedding_bn.*`; torch.func.functional_call wants the latter.
    Raises ValueError for a size below 1, another `input`, and other than four stages.
    """

    classes = None
    fixed = ("embedding_bn.weight",)
    """Parameters that no training changes."""

    def __init__(
        self,
        units: Sequence[int],
        *,
        widths: Sequence[int] = WIDTHS,
        size: int = FULL,
        input: Literal["native", "upsample"] = "native",
        dim: int = 512,
        dropout: float = 0.0,
        adaface: bool = False,
    ) -> None:
        super().__init__()
        if input not in ("native", "upsample"):
            raise ValueError(f"input is {input!r}: it must be native or upsample")
        if size < 1:
            raise ValueError(f"size is {size}: it must be at least 1 pixel a side")
        if not len(units) == len(widths) == 4:
            raise ValueError(f"{len(units)} units and {len(widths)} widths: give four of each")
        self.units = tuple(units)
        self.size = size
        self.input = input
        self.dim = dim
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        stages, c_in = [], widths[0]
        for count, width in zip(units, widths, strict=True):
            stage = [Unit(c_in, width, 2, pooled_shortcut=adaface)]
            stage += [Unit(width, width) for _ in range(count - 1)]
            stages.append(nn.Sequential(*stage))
            c_in = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn2 = nn.BatchNorm2d(c_in)
        self.dropout = nn.Dropout(dropout)
        side = -(-(size if input == "native" else FULL) // 2 ** len(widths))
        self.fc = nn.Linear(c_in * side * side, dim)
        # Public name: features. Ours is a method of that name; the hooks translate state dicts.
        self.embedding_bn = nn.BatchNorm1d(dim, affine=not adaface)
        self.register_state_dict_post_hook(_to_public)
        self.register_load_state_dict_pre_hook(_from_public)
        if not adaface:
            self.embedding_bn.weight.requires_grad_(False)  # stays 1: the head sets the scale
        for module in self.modules():
            if adaface and isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)
        if adaface:
            nn.init.zeros_(self.fc.bias)

    @property
    def stages(self) -> tuple[nn.Sequential, ...]:
        """The four stages, each a sequence of `Unit`."""
        return self.layer1, self.layer2, self.layer3, self.layer4

    def stem(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, widths[0], H, W]."""
        return self.prelu(self.bn1(self.conv1(x)))

    def head(self, x: Tensor) -> Tensor:
        """The last map [B, widths[3], h, w] -> embedding [B, dim]; float32 from the linear layer
        on, whatever autocast says, as in InsightFace: lengths and cosines are read from it."""
        flat = self.dropout(self.bn2(x).flatten(1))
        with without_autocast(x):
            return self.embedding_bn(self.fc(flat.to(self.fc.weight.dtype)))

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, dim]; ValueError for a size that the network does not take."""
        return self(x)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, 3, H, W] -> ([B, dim], maps); ValueError for a size the network does not take."""
        if self.input == "upsample" and x.shape[2:] != (FULL, FULL):
            x = F.interpolate(x, (FULL, FULL), mode="bilinear", antialias=True)
        elif self.input == "native" and x.shape[1:] != (3, self.size, self.size):
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
            "IResNet has no classifier: use a head of shared.models.heads, such as CosFace"
        )


def adaface_names(units: Sequence[int]) -> dict[str, str]:
    """AdaFace's module names -> those of `IResNet(units)`, for all modules that have weights."""
    names = {
        "input_layer.0": "conv1",
        "input_layer.1": "bn1",
        "input_layer.2": "prelu",
        "output_layer.0": "bn2",  # 1 and 2 are dropout and flatten
        "output_layer.3": "fc",
        "output_layer.4": "features",
    }
    inner = {
        "res_layer.0": "bn1",
        "res_layer.1": "conv1",
        "res_layer.2": "bn2",
        "res_layer.3": "prelu",
        "res_layer.4": "conv2",
        "res_layer.5": "bn3",
        "shortcut_layer.0": "downsample.0",
        "shortcut_layer.1": "downsample.1",
    }
    ours = [f"layer{stage}.{i}" for stage, n in enumerate(units, start=1) for i in range(n)]
    for body, unit in enumerate(ours):
        names |= {f"body.{body}.{key}": f"{unit}.{name}" for key, name in inner.items()}
    return names


def _to_public(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    _rename(state, f"{prefix}embedding_bn.", f"{prefix}features.")


def _from_public(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, f"{prefix}features.", f"{prefix}embedding_bn.")


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for name in [name for name in state if name.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)


_UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
_adaface = partial(IResNet, adaface=True, dropout=0.4)

MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"iresnet{depth}": partial(IResNet, units) for depth, units in _UNITS.items()},
    # BTNet's on the embedded data: one unit a stage, a fourth of the channels, D = 128.
    "small-iresnet": partial(IResNet, (1, 1, 1, 1), widths=(16, 32, 64, 128), dim=128),
    "adaface-ir18": partial(_adaface, _UNITS[18]),
    "adaface-ir34": partial(_adaface, _UNITS[34]),
    "adaface-ir50": partial(_adaface, _UNITS[50]),
    "adaface-ir101": partial(_adaface, _UNITS[100]),
}
