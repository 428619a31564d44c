"""Weights from and to disk. No file that is read here can run code."""

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from shared.files import write_bytes
from shared.models.imagenet import RetrievalResNet
from shared.models.iresnet import IResNet, adaface_names

# Where training programs keep the weights in their files.
_PLACES = {
    "state_dict_backbone": "InsightFace training checkpoint",
    "model": 'state dict under "model"',
    "state_dict": 'state dict under "state_dict"',
}


# What the networks of this folder call that which makes an embedding or logits of their last map.
AFTER_TRUNK = ("embedding.", "linear.", "fc.", "classifier.", "bn.", "features.")


@dataclass(frozen=True)
class Loaded:
    """What `load_backbone` found in a file; str() says it in one line."""

    layout: str
    """Whose file it is, and where in it the weights are."""
    left_out: tuple[str, ...] = ()
    """Names in the file that the network has no use for, such as a classifier's."""
    kept: tuple[str, ...] = ()
    """Names of the network that such files do not have: they stay as they were."""
    bgr: bool = False
    """Whether the weights were for BGR images, and were turned to RGB."""

    def __str__(self) -> str:
        said = [self.layout]
        if self.left_out:
            said.append(f"left out {_shortened('of its entries', self.left_out)}")
        if self.kept:
            said.append(f"not in it and kept: {_shortened('of the network', self.kept)}")
        if self.bgr:
            said.append("BGR weights turned to RGB")
        return "; ".join(said)


def load_backbone(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    bgr: bool | None = None,
    trunk: bool = False,
) -> Loaded:
    """Copies a checkpoint's weights into `model`; every name and shape must agree.

    The file is safetensors, or a torch file (zip or the older format) holding a state dict, alone
    or under "model", "state_dict" or "state_dict_backbone" (as RepDistiller, Lightning and
    InsightFace write them). The kind is told by content, not by suffix. Three things are
    translated, each by name:

    - A "module." in front of all names, left there by data-parallel training, is dropped.
    - AdaFace's: "model." in front and `head.*` are dropped, the modules get our names.
    - torchvision's ImageNet ResNets, for `RetrievalResNet`: `fc.*`, the classifier, is left out and
      the network's own `embedding.*` is kept.
    - Of a whole recogniser (shared.models.recogniser.save) for its backbone: "backbone." in front
      is dropped and the head left out.

    bgr: whether the weights are for BGR images; the stem's input channels are then exchanged, so
        that RGB images give what BGR ones gave. None: yes for AdaFace's files, no for others.
    trunk: the file is where training starts, so what comes after the last map (embedding,
        classifier: `AFTER_TRUNK`) may be missing, too much or of another shape; it is left out, and
        the network's own stays as it was.

    Raises ValueError for names or shapes that do not agree (it lists them and `model` is left as
    it was), for `bgr` where no convolution sees three channels, and for a file that is truncated,
    no checkpoint, or in need of full unpickling; FileNotFoundError where there is no file.
    """
    path = Path(path)
    state, layout = _read(path)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state, found = _translated(model, state, layout, bgr)
    if trunk:
        state, found = _trunk_of(model, state, found)
    own = {name: value for name, value in model.state_dict().items() if name not in found.kept}
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    retyped = [
        f"{name} {state[name].dtype} instead of {own[name].dtype}"
        for name in own
        if name in state
        and state[name].dtype.is_floating_point != own[name].dtype.is_floating_point
    ]
    problems = [
        _shortened(what, names)
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
            ("of another kind", retyped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Create the model that was trained, for the same classes and input size"
        )
    if found.bgr:
        _stem(model)  # refuses before anything is changed
    untouched = {name: value for name, value in model.state_dict().items() if name in found.kept}
    model.load_state_dict(state | untouched, strict=True)
    if found.bgr:
        exchange_red_and_blue(model)
    return found


@torch.no_grad()
def exchange_red_and_blue(model: nn.Module) -> None:
    """Makes a network for BGR images one for RGB images, or back, in place.

    Raises ValueError where its first convolution does not see three channels.
    """
    weight = _stem(model).weight
    weight.copy_(weight.flip(1))


def save_safetensors(
    model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Writes the state dict of `model` with `metadata` (str to str), atomically.

    A reader sees the old file or the new one, never half of one (shared.files.write_bytes).
    Tensors are stored contiguous and unshared. Raises ValueError for metadata that is not text,
    OSError naming the path when the disk is full.
    """
    path = Path(path)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata {key!r}: {value!r} for {path}: both must be str")
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    write_bytes(path, safetensors.torch.save(tensors, metadata=dict(metadata)))


def _stem(model: nn.Module) -> nn.Conv2d:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.in_channels != 3:
        raise ValueError(
            f"{type(model).__name__} has no convolution of three channels whose red and blue could "
            "be exchanged: load it without bgr"
        )
    return first


def _translated(
    model: nn.Module, state: dict[str, Tensor], layout: str, bgr: bool | None
) -> tuple[dict[str, Tensor], Loaded]:
    """The state dict in our names, and what was recognised."""
    if any(name.startswith(("input_layer.", "model.input_layer.")) for name in state):
        left_out = tuple(name for name in state if name.startswith("head."))
        state = {n.removeprefix("model."): t for n, t in state.items() if n not in left_out}
        if isinstance(model, IResNet):
            ours = adaface_names(model.units)
            state = {_renamed(name, ours): tensor for name, tensor in state.items()}
        return state, Loaded(f"AdaFace, {layout}", left_out, bgr=bgr is not False)
    if not hasattr(model, "backbone") and any(name.startswith("backbone.") for name in state):
        left_out = tuple(name for name in state if not name.startswith("backbone."))
        state = {n.removeprefix("backbone."): t for n, t in state.items() if n not in left_out}
        return state, Loaded(f"backbone of a recogniser, {layout}", left_out, bgr=bgr is True)
    classifier, embedding = ("fc.weight", "fc.bias"), ("embedding.weight", "embedding.bias")
    if isinstance(model, RetrievalResNet) and state.keys() >= set(classifier):
        state = {name: tensor for name, tensor in state.items() if name not in classifier}
        return state, Loaded(f"torchvision, {layout}", classifier, embedding, bgr is True)
    return state, Loaded(layout, bgr=bgr is True)


def _trunk_of(
    model: nn.Module, state: dict[str, Tensor], found: Loaded
) -> tuple[dict[str, Tensor], Loaded]:
    """The entries less those after the trunk that do not fit, and these noted."""
    own = model.state_dict()
    after = [n for n in (state | own) if n.startswith(AFTER_TRUNK)]
    unfit = {n for n in after if n not in own or n not in state or own[n].shape != state[n].shape}
    left_out = (*found.left_out, *(n for n in state if n in unfit))
    kept = dict.fromkeys((*found.kept, *(n for n in own if n in unfit)))
    fitting = {name: tensor for name, tensor in state.items() if name not in unfit}
    return fitting, replace(found, left_out=left_out, kept=tuple(kept))


def _renamed(name: str, names: Mapping[str, str]) -> str:
    module, _, field = name.rpartition(".")
    return f"{names[module]}.{field}" if module in names else name


class _Ignored:
    """Stands in for what a training program keeps beside the weights; it does and holds nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# RepDistiller's last checkpoint keeps its options, and its optimizer's learning rate is a numpy
# scalar once it has decayed; Lightning before 1.5 names callbacks by class. None of these is run.
_IGNORED: list[Callable | tuple[Callable, str]] = [
    (_Ignored, name)
    for name in (
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.core.multiarray.scalar",  # written by numpy 1
        "numpy._core.multiarray.scalar",
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    )
]


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict in a file, and where it was."""
    with open(path, "rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{":  # safetensors: eight bytes of header length, then JSON
            return safetensors.torch.load_file(path), "safetensors"
        if head.startswith(b"PK\3\4"):
            _check_sizes(path)
        with torch.serialization.safe_globals(_IGNORED):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen types for damaged bytes
        # torch goes on to suggest full unpickling: only its finding is passed on
        finding = str(error).rpartition("WeightsUnpickler error: ")[2].split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{path} is no readable checkpoint (truncated, another format, or a pickle of more "
            f"than tensors, which is never run): {type(error).__name__}: {finding}"
        ) from error
    layout = "state dict"
    for key, place in _PLACES.items():
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded, layout = loaded[key], place
            break
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} holds no state dict but {type(loaded).__name__}")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} holds no state dict: entry {name!r} is {type(tensor).__name__}, no tensor"
            )
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise ValueError(f"{path}: {name} is no plain tensor (sparse, or without its data)")
    return dict(loaded), layout


def _check_sizes(path: Path) -> None:
    """torch stores the members of its zip files as they are: none may claim to be larger."""
    with zipfile.ZipFile(path) as file:
        claimed = sum(member.file_size for member in file.infolist())
    if claimed > path.stat().st_size:
        raise ValueError(f"its members claim {claimed:,} bytes, more than the file has")


def _shortened(what: str, names: Sequence[str], shown: int = 4) -> str:
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what} ({', '.join(names[:shown])}{more})"
