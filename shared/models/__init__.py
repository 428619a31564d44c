"""Networks by name. The face that all of them share is described in `shared.models.cifar`."""

import copy
import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shared.models import cifar, embedding, imagenet, iresnet

MODELS: dict[str, Callable[..., nn.Module]] = {
    **cifar.MODELS,
    **embedding.MODELS,
    **iresnet.MODELS,
    **imagenet.MODELS,
}


def create(name: str, **kwargs: Any) -> nn.Module:
    """The network called `name`, freshly initialised.

    kwargs go to its constructor: `classes` (default 100) for the CIFAR family; `size` and `dim`
    for the small embedding networks; those, `input` and `dropout` for the face networks; `width`
    and `dim` for slim-resnet34; `dim` for the retrieval networks and, for their ResNets, `weights`.
    "timm:NAME" is timm's model of that name, with `classes` and what timm.create_model takes.
    Raises ValueError for an unknown name.
    """
    if name.startswith("timm:"):
        return imagenet.TimmNetwork(name.removeprefix("timm:"), **kwargs)
    if name not in MODELS:
        raise ValueError(_unknown(name))
    return MODELS[name](**kwargs)


def build(name: str, *, size: int, classes: int, input: str = "native") -> nn.Module:
    """`create` for images of size x size and `classes` classes: each family takes what it needs.

    The network's own `classes` is None where it has no classifier. input: that of the face networks
    (shared.models.iresnet); ValueError for "upsample" elsewhere.
    """
    if name in iresnet.MODELS:
        return create(name, size=size, input=input)
    if input != "native":
        raise ValueError(f"{name}: only iresnet and adaface networks enlarge their input")
    if name in cifar.MODELS or name.startswith("timm:"):
        return create(name, classes=classes)
    if name in imagenet.MODELS or name == "slim-resnet34":  # of any size
        return create(name)
    return create(name, size=size)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or frozen; buffers such as running means are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, size: int) -> int:
    """Multiply-accumulates of one [3, size, size] image, classifier included where there is one.

    Counted by torch.utils.flop_counter (two of its FLOPs are one) in a forward pass of a copy
    without data: convolutions and matrix products, but no batch norm, activation or pooling.
    """
    twin: Any = copy.deepcopy(model).to("meta").eval()
    dtype = next(twin.parameters()).dtype
    image = torch.empty(1, 3, size, size, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = twin.features(image)
        if twin.classes is not None:
            twin.classify(features)
    return counter.get_total_flops() // 2


def _unknown(name: str) -> str:
    plain = {known.lower(): known for known in MODELS}
    near = difflib.get_close_matches(name.lower().replace("_", "-"), plain, n=3)
    hint = f"; did you mean {' or '.join(plain[match] for match in near)}?" if near else ""
    return f"unknown model {name!r}{hint} Known models: {', '.join(MODELS)}, timm:..."
