"""Retrieval networks: an ImageNet trunk, global average pooling and a linear embedding; and timm.

imagenet-resnet18, imagenet-resnet50, imagenet-resnet101: torchvision's trunks under torchvision's
module names, so its checkpoints load (shared.models.checkpoints). mobilenet-0.25: MobileNetV1 at a
quarter of its widths (Howard et al. 2017, Table 1). With the 512-d embedding these are the networks
of EmbedKD's Table 4: 43.55M (ResNet-101), 11.4M (ResNet-18) and .345M parameters. The embedding is
raw: EmbedKD normalises it.

All have the face that `shared.models.cifar` describes, without a classifier (`classes` is None).
Inputs of any size are taken. Maps: "stem" before its pool (1/2 of the input's side), "stage1" ...
"stage4" (1/4, 1/8, 1/16, 1/32), each after its last ReLU. A bottleneck trunk (ResNet-50, -101) also
gives "stage1.inner" ... "stage4.inner": the 3x3 convolution of the stage's last bottleneck after BN
and ReLU, 64, 128, 256, 512 channels, which EmbedKD's hints compare with a ResNet-18's stages.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn


class RetrievalNetwork(nn.Module):
    """What the networks of this file have in common; see the head of the file for shapes."""

    classes = None

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.embedding = nn.Linear(width, dim)

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> maps by name, "stage4" among them."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, dim], not normalised."""
        return self(x)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, 3, H, W] -> ([B, dim], maps)."""
        maps = self.maps(x)
        pooled = F.adaptive_avg_pool2d(maps["stage4"], 1).flatten(1)
        return self.embedding(pooled), maps

    def classify(self, embedding: Tensor) -> NoReturn:
        """Raises ValueError: an embedding network has no classifier of its own."""
        raise ValueError(
            f"{type(self).__name__} has no classifier: use a head of shared.models.heads, "
            "such as CosFace"
        )


class RetrievalResNet(RetrievalNetwork):
    """torchvision's resnet18, resnet50 or resnet101 with the classifier replaced.

    weights: None, or "imagenet" for torchvision's IMAGENET1K_V1, those of the papers' time
        (downloaded once, kept in torch's hub folder).
    Raises ValueError for other `weights`, or where they cannot be downloaded.
    """

    def __init__(
        self, name: str, *, dim: int = 512, weights: Literal["imagenet"] | None = None
    ) -> None:
        from torchvision import models  # seconds to import, which no other network should wait

        trunk: Any = models.get_model(name, weights=None)
        super().__init__(trunk.fc.in_features, dim)
        self.name = name
        self.conv1 = trunk.conv1
        self.bn1 = trunk.bn1
        self.layer1: nn.Sequential = trunk.layer1
        self.layer2: nn.Sequential = trunk.layer2
        self.layer3: nn.Sequential = trunk.layer3
        self.layer4: nn.Sequential = trunk.layer4
        if weights is not None:
            self.load_published(weights)

    def load_published(self, weights: str) -> None:
        """Fill the trunk as `weights` of the constructor does; the embedding stays as it is."""
        trunk = {k: v for k, v in _published(self.name, weights).items() if k[:3] != "fc."}
        own = {k: v for k, v in self.state_dict().items() if k.startswith("embedding.")}
        self.load_state_dict(trunk | own)

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        maps = {"stem": F.relu(self.bn1(self.conv1(x)))}
        out = F.max_pool2d(maps["stem"], 3, stride=2, padding=1)
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        for name, stage in zip(("stage1", "stage2", "stage3", "stage4"), stages, strict=True):
            *blocks, last = stage
            for block in blocks:
                out = block(out)
            if hasattr(last, "conv3"):  # a bottleneck
                maps[f"{name}.inner"] = _inner(last, out)
                out = _outer(last, maps[f"{name}.inner"], out)
            else:
                out = last(out)
            maps[name] = out
        return maps


def _inner(block: Any, x: Tensor) -> Tensor:
    """The first two thirds of torchvision's bottleneck: 1x1, 3x3, each with BN and ReLU."""
    out = F.relu(block.bn1(block.conv1(x)))
    return F.relu(block.bn2(block.conv2(out)))


def _outer(block: Any, inner: Tensor, x: Tensor) -> Tensor:
    shortcut = x if block.downsample is None else block.downsample(x)
    return F.relu(block.bn3(block.conv3(inner)) + shortcut)


def _published(name: str, weights: str) -> dict[str, Tensor]:
    if weights != "imagenet":
        raise ValueError(f"weights is {weights!r}: it must be imagenet, or None for fresh ones")
    from torchvision import models

    published: Any = models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return published.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except Exception as error:  # of the network, of the disk, of a damaged file in torch's cache
        raise ValueError(
            f"weights 'imagenet' of {name} could not be had from {published.url} "
            f"({type(error).__name__}: {''.join(str(error).splitlines()[:1])[:80]}): "
            "fetch that file elsewhere and name it with --student.weights or --teacher.weights "
            "(shared.models.checkpoints.load_backbone)"
        ) from error


class MobileNetV1(RetrievalNetwork):
    """Depthwise-separable convolutions throughout, each half with BN and ReLU; `width` scales all.

    The stem is the one full convolution; a stage begins where the map is halved, except that
    the first separable block (stride 1) counts to stage 1.
    """

    # output channels at width 1 and stride of each separable block, by stage
    SETTING = (
        ((64, 1), (128, 2), (128, 1)),
        ((256, 2), (256, 1)),
        ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
        ((1024, 2), (1024, 1)),
    )

    def __init__(self, width: float, *, dim: int = 512) -> None:
        super().__init__(int(1024 * width), dim)
        c_in = int(32 * width)
        self.stem = _conv_bn_relu(3, c_in, 3, 2)
        self.stages = nn.ModuleList()
        for blocks in self.SETTING:
            stage = []
            for channels, stride in blocks:
                c_out = int(channels * width)
                stage.append(_conv_bn_relu(c_in, c_in, 3, stride, groups=c_in))
                stage.append(_conv_bn_relu(c_in, c_out, 1, 1))
                c_in = c_out
            self.stages.append(nn.Sequential(*stage))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        maps = {"stem": self.stem(x)}
        out = maps["stem"]
        for i, stage in enumerate(self.stages, start=1):
            out = maps[f"stage{i}"] = stage(out)
        return maps


def _conv_bn_relu(
    c_in: int, c_out: int, kernel: int, stride: int, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
    )


class TimmNetwork(nn.Module):
    """A model of timm (https://github.com/huggingface/pytorch-image-models) without its classifier.

    features(x) is what timm pools before its classifier. forward(x) gives it with the maps of
    timm's `forward_intermediates`, in its order: "stage1", "stage2", ... [B, C, h, w] (for a
    MobileNet the first is the stem, for a ViT there is one a block); none for the few models
    without that method. Input sizes are the model's affair: a ViT wants `img_size`.

    classes: None, or the size of a fresh linear classifier on the features.
    kwargs go to timm.create_model (pretrained=True downloads weights).
    Raises ValueError where timm is not installed, knows no such name or refuses the arguments.
    """

    def __init__(self, name: str, *, classes: int | None = None, **kwargs: Any) -> None:
        super().__init__()
        try:
            import timm  # an optional extra, and slow to import
        except ImportError as error:
            raise ValueError(
                f"timm:{name} needs timm, which is not installed: pip install timm"
            ) from error
        try:
            net: Any = timm.create_model(name, num_classes=0, **kwargs)
        except Exception as error:  # RuntimeError for a name, TypeError for an argument, network
            finding = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"timm:{name} cannot be made: {finding}") from error
        # MobileNets widen once more between the last map and the classifier
        self.dim = int(getattr(net, "head_hidden_size", None) or net.num_features)
        self.net = net
        self.classes = classes
        self.classifier = None if classes is None else nn.Linear(self.dim, classes)

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, dim]."""
        return self.net(x)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, 3, H, W] -> ([B, dim], maps)."""
        if not hasattr(self.net, "forward_intermediates"):
            return self.net(x), {}
        last, maps = self.net.forward_intermediates(x)
        return self.net.forward_head(last), {f"stage{i}": m for i, m in enumerate(maps, start=1)}

    def classify(self, embedding: Tensor) -> Tensor:
        """[B, dim] -> logits [B, classes]; ValueError without `classes`."""
        if self.classifier is None:
            raise ValueError(
                "this timm network was created without classes: name their number, or use a head "
                "of shared.models.heads, such as CosFace"
            )
        return self.classifier(embedding)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "imagenet-resnet18": partial(RetrievalResNet, "resnet18"),
    "imagenet-resnet50": partial(RetrievalResNet, "resnet50"),
    "imagenet-resnet101": partial(RetrievalResNet, "resnet101"),
    "mobilenet-0.25": partial(MobileNetV1, 0.25),
}
