"""A backbone and what makes logits of its embedding: the teacher and student of every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from shared.config import Data, Network
from shared.data.pipeline import student_input
from shared.data.protocols import Task
from shared.degrade import low, to_uint8
from shared.models import build, checkpoints, heads
from shared.models.imagenet import RetrievalResNet

if TYPE_CHECKING:
    from shared.run import Run

HEADS: dict[str, Callable[..., heads.CosineHead]] = {
    "arcface": heads.ArcFace,
    "cosface": heads.CosFace,
    "curricularface": heads.CurricularFace,
    "magface": heads.MagFace,
    "adaface": heads.AdaFace,
}


class Recogniser(nn.Module):
    """backbone(x) -> (embedding [B, D], maps); logits(embedding, label) -> [B, classes].

    With a margin head, `label=None` gives the margin-free s * cos: what logit distillation and
    scoring use. With head "none" there are no logits: [B, 0].
    """

    def __init__(self, network: Network, size: int, classes: int) -> None:
        super().__init__()
        self.backbone = build(network.name, size=size, classes=classes, input=network.input)
        self.classes = classes
        self.head: nn.Module | None = None
        self.classified = network.head != "none"
        if network.head in HEADS:
            head = HEADS[network.head]
            self.head = head(self.dim, classes, scale=network.scale, margin=network.margin)
        if network.head != "softmax":
            self._freeze_classifier()
        elif self.backbone.classes is None:
            raise ValueError(
                f"{network.name} has no classifier of its own: give it a --student.head or "
                f"--teacher.head ({', '.join(HEADS)}, none)"
            )

    @property
    def dim(self) -> int:
        return int(self.backbone.dim)  # type: ignore[arg-type]

    def _freeze_classifier(self) -> None:
        """A classifier that is not used gets no gradient: data-parallel training would wait for
        it."""
        if self.backbone.classes is None:
            return
        parameters = list(self.backbone.parameters())
        logits: Tensor = self.backbone.classify(torch.zeros(1, self.dim))  # type: ignore[operator]
        reached = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, reached, strict=True):
            parameter.requires_grad_(gradient is None)

    @property
    def penalty(self) -> Tensor:
        """The head's regulariser of its last call (MagFace), to be added to the loss; else 0."""
        if self.head is None:
            return next(self.parameters()).new_zeros(())
        return self.head.penalty  # type: ignore[return-value]

    def forward(self, x: Tensor, maps: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Normalised images [B, 3, H, W] -> embedding [B, D]; with `maps`, (embedding, the
        backbone's feature maps by name [B, C, h, w])."""
        embedding, found = self.backbone(x)
        return (embedding, found) if maps else embedding

    def logits(self, embedding: Tensor, label: Tensor | None = None) -> Tensor:
        """[B, D] -> [B, classes] float32; [B, 0] without classes."""
        if not self.classified:
            return embedding.new_zeros(len(embedding), 0, dtype=torch.float32)
        if self.head is None:
            with torch.autocast(embedding.device.type, enabled=False):
                return self.backbone.classify(embedding.float())  # type: ignore[operator]
        return self.head(embedding, label)

    def logit_pair(self, embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """`logits` with label and without: what is classified by, and what is distilled."""
        if self.head is None:
            logits = self.logits(embedding)
            return logits, logits
        return self.head.pair(embedding, label)  # type: ignore[operator]


def begin(
    run: Run, network: Network, size: int, classes: int, flag: str = "--student"
) -> Recogniser:
    """A recogniser to be trained, on the run's device: fresh, but for what `network.weights` names.

    Every rank has to call it: the first one downloads. To go on from a checkpoint or to load a
    trained network, `Recogniser` is enough. Raises ValueError for weights that do not fit or cannot
    be had.
    """

    def made() -> Recogniser:
        recogniser = Recogniser(network, size, classes)
        if network.weights:
            run.say(f"{network.name}: {load_weights(recogniser, network, flag)}")
        return recogniser

    return run.place(run.in_turn(made))


def load_weights(recogniser: Recogniser, network: Network, flag: str) -> str:
    """Load what `network.weights` names into the backbone; returns a line that says what it was.
    `flag`, such as --student, is for messages.

    "imagenet": torchvision's, for its ResNets (shared.models.imagenet). Else a file of the same
    architecture; what makes embedding or logits may be missing there and stays as it is.
    """
    flag += ".weights"
    backbone = recogniser.backbone
    if network.weights != "imagenet":
        path = Path(network.weights).expanduser()
        if not path.is_file():
            raise ValueError(f"{flag} {path}: no such file (or imagenet)")
        try:
            found = checkpoints.load_backbone(backbone, path, trunk=True)
        except ValueError as error:
            raise ValueError(f"{flag} {error}") from None
        return f"starts from {path} ({found})"
    if not isinstance(backbone, RetrievalResNet):
        raise ValueError(
            f"{flag} imagenet: torchvision has no such weights for {network.name}; give a file "
            "of it, or take imagenet-resnet18, -resnet50 or -resnet101"
        )
    backbone.load_published("imagenet")
    return "starts from torchvision's ImageNet weights, its embedding from random numbers"


@torch.no_grad()
def copy_matching(source: nn.Module, target: nn.Module) -> list[str]:
    """Copy every parameter and buffer of `source` that has the name and shape of one in `target`.

    Returns the names of `target` that were left as they were. For a student that starts from a
    network of its own architecture for larger images.
    """
    found, left = source.state_dict(), []
    for name, own in target.state_dict().items():
        if name in found and found[name].shape == own.shape:
            own.copy_(found[name])
        else:
            left.append(name)
    return left


class Student(nn.Module):
    """A trained student as it goes on a camera: LR images at native size in, one tensor out.

    forward(x): x [B, 3, lr, lr], uint8 or float in [0, 1]; enlarged here for a network that was
    trained so (Data.quality "enlarged"). Faces: embedding [B, D], to be
    compared by cosine. Objects: logits [B, classes]. alignment: how its faces must be cut out
    ("arcface", "box+0.2", "whole"); empty where that is not known or there is nothing to cut.
    """

    def __init__(
        self, recogniser: Recogniser, data: Data, task: Task, alignment: str = ""
    ) -> None:
        super().__init__()
        self.recogniser, self.data, self.task = recogniser, data, task
        self.alignment = alignment
        self.classes = recogniser.classes

    def forward(self, x: Tensor) -> Tensor:
        pixels = to_uint8(x) if x.is_floating_point() else x
        embedding = self.recogniser(student_input(pixels, self.data))
        return embedding if self.task == "faces" else self.recogniser.logits(embedding)


def reader(recogniser: Recogniser, data: Data, task: Task) -> Callable[[Tensor], Tensor]:
    """The network as evaluators call it: uint8 HR images, degraded here, to what is scored.

    Puts the recogniser into evaluation mode.
    """
    student = Student(recogniser.eval(), data, task)
    device = next(recogniser.parameters()).device

    def read(pixels: Tensor) -> Tensor:
        pixels = pixels.to(device)
        return student(low(pixels, data.lr, mode=data.kernel, antialias=data.antialias))

    return read


def enrolled_reader(recogniser: Recogniser, data: Data) -> Callable[[Tensor], Tensor] | None:
    """As `reader`, for images that are enrolled at HR: resized to the network's own input size.

    For a network of native size that is what `reader` makes of them, by the same kernel: None. One
    whose input is enlarged (Network.input "upsample", Data.quality "enlarged") takes them as they
    are.
    """
    native = getattr(recogniser.backbone, "input", "native") == "native"
    if native and data.quality != "enlarged":
        return None
    student = Student(recogniser.eval(), data, "faces")
    device = next(recogniser.parameters()).device
    return lambda pixels: student(pixels.to(device))


def save(recogniser: nn.Module, path: Path, **metadata: str) -> None:
    """Weights of backbone and head as safetensors, whole or not at all."""
    checkpoints.save_safetensors(recogniser, path, metadata)


def restore(recogniser: nn.Module, path: Path) -> None:
    """Load what `save` wrote. Raises ValueError if it does not fit."""
    try:
        checkpoints.load_backbone(recogniser, path)
    except ValueError as error:
        raise ValueError(f"a checkpoint of another architecture: {error}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """What `save` was told beside the weights."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def load_trained(
    folder: Path, network: Network, data: Data, arm: str, *, best: bool = False
) -> Student:
    """The student that a run kept under `arm`. Raises ValueError, naming those there are."""
    path = folder / "students" / f"{arm}{'-best' if best else ''}.safetensors"
    if not path.is_file():
        there = sorted(p.stem for p in (folder / "students").glob("*.safetensors"))
        raise ValueError(f"{folder}: no student {path.stem!r} (there are: {', '.join(there)})")
    metadata = read_metadata(path)
    recogniser = Recogniser(network, data.lr_input, int(metadata["classes"]))
    restore(recogniser, path)
    task, alignment = cast(Task, metadata["task"]), metadata.get("alignment", "")
    return Student(recogniser.eval(), data, task, alignment)


@torch.no_grad()
def class_means(recogniser: Recogniser, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fit a margin head to a finished backbone: each weight the mean unit embedding of its class.

    batches: (embeddings [B, D], labels [B]), each image once. For a public backbone that comes
    without its classifier.
    """
    assert recogniser.head is not None
    weight: Tensor = recogniser.head.weight  # type: ignore[assignment]
    total = torch.zeros_like(weight)
    for embeddings, labels in batches:
        unit = nn.functional.normalize(embeddings.float(), dim=1).to(weight.device)
        total.index_add_(0, labels.to(weight.device), unit)
    weight.copy_(nn.functional.normalize(total, dim=1))
