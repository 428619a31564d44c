"""Weights from and to disk. No file that is read here can run code."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from shared.files import write_bytes


def load_backbone(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copies a checkpoint's weights into `model`; every name and shape must agree.

    The file is safetensors, or a torch file holding a state dict, alone or under "model" or
    "state_dict" (as RepDistiller and InsightFace publish them). A "module." in front of all names,
    left there by data-parallel training, is dropped. The kind is told by content, not by suffix.

    Raises ValueError for names or shapes that do not agree (it lists them and `model` is left as
    it was), and for a file that is truncated, no checkpoint, or in need of full unpickling;
    FileNotFoundError where there is no file.
    """
    path = Path(path)
    state = _read(path)
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        _shortened(what, names)
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Create the model that was trained, with the same number of classes"
        )
    model.load_state_dict(state, strict=True)


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


def _read(path: Path) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{":  # safetensors: eight bytes of header length, then JSON
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen types for damaged bytes
        # torch goes on to suggest full unpickling: only its finding is passed on
        finding = str(error).rpartition("WeightsUnpickler error: ")[2].split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{path} is no readable checkpoint (truncated, another format, or a pickle of more "
            f"than tensors, which is never run): {type(error).__name__}: {finding}"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} holds no state dict but {type(loaded).__name__}")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} holds no state dict: entry {name!r} is {type(tensor).__name__}, no tensor"
            )
    return dict(loaded)


def _shortened(what: str, names: Sequence[str], shown: int = 4) -> str:
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what} ({', '.join(names[:shown])}{more})"
