"""The CIFAR family: the teachers and students of CRRCD Tables I-IV and of the CRD benchmark.

Architectures, module names and initial weights are those of the public RepDistiller repository
(https://github.com/HobbitLong/RepDistiller), so that its teacher checkpoints load with
`strict=True` and give the same logits at 32x32. Two things are ours: every network ends in
adaptive average pooling, and VGG leaves a pool out where the map would vanish. Inputs of other
sizes (8x8, 16x16, 64x64) therefore work natively; the public fixed-size pooling breaks there, or
silently mixes pixels into the batch.

ResNet18, ResNet34 and ResNet50 are the public `resnetv2` file (ImageNet widths, 3x3 stem). The
bottleneck `wrn50-2` has no RepDistiller checkpoint: it is torchvision's wide_resnet50_2 (inner
width doubled) with the CIFAR stem and the key names of ResNet50.

All have one face:
    features(x)          x [B, 3, H, W] -> [B, dim], pooled, before the classifier
    forward(x)           (features(x), maps): feature maps "stem", "stage1", ... [B, C, h, w]
    classify(embedding)  [B, dim] -> logits [B, classes]
    dim, classes
The maps are those that the public code hands to its feature losses: after the activation, except
that the wide residual networks and MobileNetV2 give the raw sum or projection that ends a stage.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CifarNetwork(nn.Module):
    """What the networks of this file have in common; see the head of the file for shapes."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.dim = dim
        self.classes = classes

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, dim]."""
        return self(x)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, 3, H, W] -> ([B, dim], maps)."""
        raise NotImplementedError

    def classify(self, embedding: Tensor) -> Tensor:
        """[B, dim] -> logits [B, classes]."""
        raise NotImplementedError


def _pool(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _conv3x3(c_in: int, c_out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, groups=groups, bias=False)


def _conv1x1(c_in: int, c_out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 1, stride, groups=groups, bias=False)


def _projection(c_in: int, c_out: int, stride: int) -> nn.Module:
    """The shortcut of a residual block: 1x1 convolution + BN, or nothing where shapes agree."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(_conv1x1(c_in, c_out, stride), nn.BatchNorm2d(c_out))


def _kaiming(network: nn.Module) -> None:
    """He et al.'s normal initialisation by fan-out, which the public recipes share."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _normal_linear(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)


# ---- resnet8 ... resnet110, resnet8x4, resnet32x4 -------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016), [B, c_in, h, w] -> [B, c_out, ...]."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(c_in, c_out, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = _conv3x3(c_out, c_out)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = _projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class CifarResNet(CifarNetwork):
    """ResNet of depth 6n+2 with n basic blocks in each of three stages.

    widths: stem, stage 1, stage 2, stage 3.
    """

    def __init__(self, depth: int, widths: Sequence[int], classes: int = 100) -> None:
        super().__init__(widths[3], classes)
        self.conv1 = _conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(blocks, widths[0], widths[1], 1)
        self.layer2 = self._stage(blocks, widths[1], widths[2], 2)
        self.layer3 = self._stage(blocks, widths[2], widths[3], 2)
        self.fc = nn.Linear(widths[3], classes)
        _kaiming(self)

    @staticmethod
    def _stage(blocks: int, c_in: int, c_out: int, stride: int) -> nn.Sequential:
        first = BasicBlock(c_in, c_out, stride)
        return nn.Sequential(first, *(BasicBlock(c_out, c_out) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        maps = {"stem": F.relu(self.bn1(self.conv1(x)))}
        maps["stage1"] = self.layer1(maps["stem"])
        maps["stage2"] = self.layer2(maps["stage1"])
        maps["stage3"] = self.layer3(maps["stage2"])
        return _pool(maps["stage3"]), maps

    def classify(self, embedding: Tensor) -> Tensor:
        return self.fc(embedding)


# ---- ResNet18, ResNet34, ResNet50, wrn50-2 --------------------------------------------------


class ShortcutBasic(nn.Module):
    """The basic block of ResNet18 and ResNet34; only the shortcut's name differs from above."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int = 1, widen: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(c_in, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _projection(c_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ShortcutBottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1; `widen` multiplies the inner width only."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int = 1, widen: int = 1) -> None:
        super().__init__()
        inner, c_out = width * widen, width * self.expansion
        self.conv1 = _conv1x1(c_in, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv3x3(inner, inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = _conv1x1(inner, c_out)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut = _projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class ImageNetResNet(CifarNetwork):
    """ResNet of ImageNet widths (64-128-256-512) with a 3x3 stride-1 stem and no stem pool."""

    def __init__(
        self,
        block: type[ShortcutBasic] | type[ShortcutBottleneck],
        blocks: Sequence[int],
        widen: int = 1,
        classes: int = 100,
    ) -> None:
        super().__init__(512 * block.expansion, classes)
        self.conv1 = _conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        stages, c_in = [], 64
        for width, count, stride in zip((64, 128, 256, 512), blocks, (1, 2, 2, 2), strict=True):
            stage = [block(c_in, width, stride, widen)]
            c_in = width * block.expansion
            stage += [block(c_in, width, 1, widen) for _ in range(count - 1)]
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(c_in, classes)
        _kaiming(self)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        maps = {"stem": F.relu(self.bn1(self.conv1(x)))}
        maps["stage1"] = self.layer1(maps["stem"])
        maps["stage2"] = self.layer2(maps["stage1"])
        maps["stage3"] = self.layer3(maps["stage2"])
        maps["stage4"] = self.layer4(maps["stage3"])
        return _pool(maps["stage4"]), maps

    def classify(self, embedding: Tensor) -> Tensor:
        return self.linear(embedding)


# ---- wrn-16-1, wrn-16-2, wrn-40-1, wrn-40-2 -------------------------------------------------


class PreactBlock(nn.Module):
    """BN-ReLU before each convolution (Zagoruyko and Komodakis 2016).

    Where the width changes, the shortcut too starts from the activated input.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = _conv3x3(c_in, c_out, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = _conv3x3(c_out, c_out)
        self.convShortcut = _conv1x1(c_in, c_out, stride) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class PreactStage(nn.Module):
    """A stage of pre-activation blocks; a module of its own for the public key `blockN.layer`."""

    def __init__(self, blocks: int, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        first = PreactBlock(c_in, c_out, stride)
        rest = (PreactBlock(c_out, c_out, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(CifarNetwork):
    """Wide residual network of depth 6n+4: three stages of n blocks, widths 16k-32k-64k."""

    def __init__(self, depth: int, widen: int, classes: int = 100) -> None:
        super().__init__(64 * widen, classes)
        blocks = (depth - 4) // 6
        self.conv1 = _conv3x3(3, 16)
        self.block1 = PreactStage(blocks, 16, 16 * widen, 1)
        self.block2 = PreactStage(blocks, 16 * widen, 32 * widen, 2)
        self.block3 = PreactStage(blocks, 32 * widen, 64 * widen, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, classes)
        _kaiming(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        maps = {"stem": self.conv1(x)}
        maps["stage1"] = self.block1(maps["stem"])
        maps["stage2"] = self.block2(maps["stage1"])
        maps["stage3"] = self.block3(maps["stage2"])
        return _pool(F.relu(self.bn1(maps["stage3"]))), maps

    def classify(self, embedding: Tensor) -> Tensor:
        return self.fc(embedding)


# ---- vgg8, vgg11, vgg13, vgg16, vgg19 -------------------------------------------------------


class VGG(CifarNetwork):
    """VGG with batch norm; five blocks, one linear layer.

    counts: convolutions in each block (their widths are 64-128-256-512-512, biases included).
    A block ends in its last BN, so the ReLU that follows carries no index of the Sequential.
    """

    def __init__(self, counts: Sequence[int], classes: int = 100) -> None:
        super().__init__(512, classes)
        blocks, c_in = [], 3
        for width, count in zip((64, 128, 256, 512, 512), counts, strict=True):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                c_in = width
            blocks.append(nn.Sequential(*layers[:-1]))
        self.block0, self.block1, self.block2, self.block3, self.block4 = blocks
        self.classifier = nn.Linear(512, classes)
        _kaiming(self)
        _normal_linear(self.classifier)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        maps = {"stem": F.relu(self.block0(x))}
        maps["stage1"] = F.relu(self.block1(_halve(maps["stem"])))
        maps["stage2"] = F.relu(self.block2(_halve(maps["stage1"])))
        maps["stage3"] = F.relu(self.block3(_halve(maps["stage2"])))
        # The public code takes the fourth pool at 64x64 inputs only (map 8x8), not at 32x32.
        last = maps["stage3"]
        maps["stage4"] = F.relu(self.block4(_halve(last) if min(last.shape[-2:]) >= 8 else last))
        return _pool(maps["stage4"]), maps

    def classify(self, embedding: Tensor) -> Tensor:
        return self.classifier(embedding)


def _halve(x: Tensor) -> Tensor:
    """2x2 max pool, left out where the map has no two pixels a side."""
    return F.max_pool2d(x, 2) if min(x.shape[-2:]) >= 2 else x


# ---- shufflenet-v1, shufflenet-v2 -----------------------------------------------------------


class ShuffleV1Block(nn.Module):
    """Grouped 1x1, depthwise 3x3, grouped 1x1 (Zhang et al. 2018).

    With stride 2 the pooled input is concatenated, so the branch makes c_out - c_in channels. The
    24-channel stem is too narrow to be grouped.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int) -> None:
        super().__init__()
        branch = c_out - c_in if stride == 2 else c_out
        mid = branch // 4
        self.stride = stride
        self.groups = 1 if c_in == 24 else groups
        self.conv1 = _conv1x1(c_in, mid, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = _conv3x3(mid, mid, stride, groups=mid)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = _conv1x1(mid, branch, groups=groups)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = torch.channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1))
        return F.relu(out + x)


class ShuffleNetV1(CifarNetwork):
    """ShuffleNet with 3 groups, widths 240-480-960, 4-8-4 blocks and a 1x1 stem."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__(960, classes)
        self.conv1 = _conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(4, 24, 240)
        self.layer2 = self._stage(8, 240, 480)
        self.layer3 = self._stage(4, 480, 960)
        self.linear = nn.Linear(960, classes)
        # The public recipe leaves both ShuffleNets at PyTorch's own initialisation.

    @staticmethod
    def _stage(blocks: int, c_in: int, c_out: int) -> nn.Sequential:
        first = ShuffleV1Block(c_in, c_out, 2, 3)
        return nn.Sequential(
            first, *(ShuffleV1Block(c_out, c_out, 1, 3) for _ in range(blocks - 1))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        maps = {"stem": F.relu(self.bn1(self.conv1(x)))}
        maps["stage1"] = self.layer1(maps["stem"])
        maps["stage2"] = self.layer2(maps["stage1"])
        maps["stage3"] = self.layer3(maps["stage2"])
        return _pool(maps["stage3"]), maps

    def classify(self, embedding: Tensor) -> Tensor:
        return self.linear(embedding)


class ShuffleV2Block(nn.Module):
    """Half of the channels pass, the other half goes 1x1, depthwise 3x3, 1x1 (Ma et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _conv3x3(half, half, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)))
        return torch.channel_shuffle(torch.cat([kept, out], 1), 2)


class ShuffleV2Down(nn.Module):
    """The stride-2 block of ShuffleNetV2: both branches see all channels and halve the map."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        half = c_out // 2
        self.conv1 = _conv3x3(c_in, c_in, 2, groups=c_in)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv2 = _conv1x1(c_in, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv1x1(c_in, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _conv3x3(half, half, 2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)))
        return torch.channel_shuffle(torch.cat([left, right], 1), 2)


class ShuffleNetV2(CifarNetwork):
    """ShuffleNetV2 1x: widths 116-232-464 and 1024 after the last 1x1, 4-8-4 blocks, 1x1 stem."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__(1024, classes)
        self.conv1 = _conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(4, 24, 116)
        self.layer2 = self._stage(8, 116, 232)
        self.layer3 = self._stage(4, 232, 464)
        self.conv2 = _conv1x1(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, classes)

    @staticmethod
    def _stage(blocks: int, c_in: int, c_out: int) -> nn.Sequential:
        first = ShuffleV2Down(c_in, c_out)
        return nn.Sequential(first, *(ShuffleV2Block(c_out) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        maps = {"stem": F.relu(self.bn1(self.conv1(x)))}
        maps["stage1"] = self.layer1(maps["stem"])
        maps["stage2"] = self.layer2(maps["stage1"])
        maps["stage3"] = self.layer3(maps["stage2"])
        return _pool(F.relu(self.bn2(self.conv2(maps["stage3"])))), maps

    def classify(self, embedding: Tensor) -> Tensor:
        return self.linear(embedding)


# ---- mobilenet-v2 ---------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection (Sandler et al. 2018).

    The public network keeps the expansion convolution at ratio 1 and uses ReLU, not ReLU6.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = c_in * expansion
        self.residual = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            _conv1x1(c_in, inner),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            _conv3x3(inner, inner, stride, groups=inner),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            _conv1x1(inner, c_out),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(CifarNetwork):
    """MobileNetV2 with expansion 6 and width .5, the benchmark's "MobileNetV2" (T=6, W=.5).

    Stride 2 in the stem and 16 in all; the last 1x1 stays at 1280 channels.
    """

    # expansion, width at W=1, blocks, stride of the first block
    SETTING = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, classes: int = 100) -> None:
        super().__init__(1280, classes)
        c_in = 16
        self.conv1 = nn.Sequential(_conv3x3(3, c_in, 2), nn.BatchNorm2d(c_in), nn.ReLU())
        self.blocks = nn.ModuleList()
        for expansion, width, count, stride in self.SETTING:
            stage = []
            for i in range(count):
                stage.append(InvertedResidual(c_in, width // 2, stride if i == 0 else 1, expansion))
                c_in = width // 2
            self.blocks.append(nn.Sequential(*stage))
        self.conv2 = nn.Sequential(_conv1x1(c_in, 1280), nn.BatchNorm2d(1280), nn.ReLU())
        linear = nn.Linear(1280, classes)
        self.classifier = nn.Sequential(linear)
        _kaiming(self)
        _normal_linear(linear)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        maps = {"stem": self.conv1(x)}
        maps["stage1"] = self.blocks[1](self.blocks[0](maps["stem"]))
        maps["stage2"] = self.blocks[2](maps["stage1"])
        maps["stage3"] = self.blocks[4](self.blocks[3](maps["stage2"]))
        maps["stage4"] = self.blocks[6](self.blocks[5](maps["stage3"]))
        return _pool(self.conv2(maps["stage4"])), maps

    def classify(self, embedding: Tensor) -> Tensor:
        return self.classifier(embedding)


_NARROW, _X4 = (16, 16, 32, 64), (32, 64, 128, 256)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(CifarResNet, 8, _NARROW),
    "resnet14": partial(CifarResNet, 14, _NARROW),
    "resnet20": partial(CifarResNet, 20, _NARROW),
    "resnet32": partial(CifarResNet, 32, _NARROW),
    "resnet44": partial(CifarResNet, 44, _NARROW),
    "resnet56": partial(CifarResNet, 56, _NARROW),
    "resnet110": partial(CifarResNet, 110, _NARROW),
    "resnet8x4": partial(CifarResNet, 8, _X4),
    "resnet32x4": partial(CifarResNet, 32, _X4),
    "wrn-16-1": partial(WideResNet, 16, 1),
    "wrn-16-2": partial(WideResNet, 16, 2),
    "wrn-40-1": partial(WideResNet, 40, 1),
    "wrn-40-2": partial(WideResNet, 40, 2),
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "shufflenet-v1": ShuffleNetV1,
    "shufflenet-v2": ShuffleNetV2,
    "mobilenet-v2": MobileNetV2,
    "ResNet18": partial(ImageNetResNet, ShortcutBasic, (2, 2, 2, 2)),
    "ResNet34": partial(ImageNetResNet, ShortcutBasic, (3, 4, 6, 3)),
    "ResNet50": partial(ImageNetResNet, ShortcutBottleneck, (3, 4, 6, 3)),
    "wrn50-2": partial(ImageNetResNet, ShortcutBottleneck, (3, 4, 6, 3), 2),
}
