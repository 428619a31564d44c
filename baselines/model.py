"""What the methods add to a student while it is trained; thrown away afterwards.

One module a method, all with the same face, so that one loop serves them: `needs` says what of the
teacher it reads, forward(seen) gives its loss, unweighted. Hyper-parameters are the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import losses
from shared.config import Data
from shared.contrast import Normaliser, derangement
from shared.kernels import nce_scores
from shared.kernels.dispatch import without_autocast
from shared.losses import at_least_float32, unit
from shared.models.recogniser import Recogniser


@dataclass(frozen=True)
class Sizes:
    """What a method has to know of the networks, the data and the head before it is made."""

    student: int
    """D_s of e_s."""
    teacher: int
    """D_t of e_t."""
    student_maps: Mapping[str, int]
    """Channels of the student's maps: "stem", "stage1", ..."""
    teacher_maps: Mapping[str, int]
    images: int
    """m: training images."""
    classes: int
    scale: float
    """Of the margin head, as the margin."""
    margin: float


@dataclass(frozen=True)
class Seen:
    """A step as a method sees it: the global batch."""

    e_s: Tensor
    """[B, D_s], and e_t [B, D_t]."""
    e_t: Tensor
    z_s: Tensor
    """[B, C], as z_t: logits without margin."""
    z_t: Tensor
    maps_s: Mapping[str, Tensor]
    """[B, C, h, w] by name, as maps_t; empty unless the method needs maps."""
    maps_t: Mapping[str, Tensor]
    y: Tensor
    """[B] labels."""
    index: Tensor
    """[B] numbers of the images in the training set."""
    epoch: int
    """From 0."""
    generator: torch.Generator
    """For all draws of the step."""


def sizes(
    student: Recogniser,
    teacher: Recogniser,
    data: Data,
    *,
    images: int,
    classes: int,
    scale: float,
    margin: float,
) -> Sizes:
    """Those of two networks; the channels of their maps are found by one image each.

    Raises ValueError for fewer than two images or classes: there would be nothing to contrast.
    """
    if images < 2 or classes < 2:
        raise ValueError(
            f"{images} training images of {classes} classes: a method needs at least 2 of each"
        )
    return Sizes(
        student=student.dim,
        teacher=teacher.dim,
        student_maps=_channels(student, data.lr_input),
        teacher_maps=_channels(teacher, data.hr),
        images=images,
        classes=classes,
        scale=scale,
        margin=margin,
    )


class Method(nn.Module):
    """needs: what forward reads, of "embedding", "logits" and "maps"."""

    needs: ClassVar[frozenset[str]] = frozenset({"embedding"})

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()

    def forward(self, seen: Seen) -> Tensor:
        raise NotImplementedError


class Cosine(Method):
    """Behind a linear layer where the embeddings differ in size (ours)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.project = _projector(sizes)

    def forward(self, seen: Seen) -> Tensor:
        with without_autocast(seen.e_s):
            return losses.cosine(self.project(at_least_float32(seen.e_s)), seen.e_t)


class KD(Method):
    """Hinton et al. 2015."""

    needs = frozenset({"logits"})
    TEMPERATURE = 4.0

    def forward(self, seen: Seen) -> Tensor:
        return losses.kd(seen.z_s, seen.z_t, self.TEMPERATURE)


class FitNet(Method):
    """The student's second stage behind a convolution, batch norm and ReLU.

    RepDistiller's regressor has a strided or a transposed convolution where one side is twice the
    other, a kernel as large as the difference where the student's is larger, and refuses the rest.
    Here the larger map is averaged to the smaller, as in attention transfer, and the kernel is 1x1,
    which is theirs where the sides agree.
    """

    needs = frozenset({"maps"})
    STAGE = "stage2"  # the middle of three or four

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        _shared_stages(sizes, self.STAGE)
        channels = sizes.teacher_maps[self.STAGE]
        self.regressor = nn.Sequential(
            nn.Conv2d(sizes.student_maps[self.STAGE], channels, 1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, seen: Seen) -> Tensor:
        a, b = _pooled(seen.maps_s[self.STAGE], seen.maps_t[self.STAGE])
        with without_autocast(a):
            return losses.fitnet(self.regressor(a), b)


class AttentionTransfer(Method):
    """Zagoruyko & Komodakis 2017, over the stages that both networks have."""

    needs = frozenset({"maps"})

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.stages = _shared_stages(sizes)

    def forward(self, seen: Seen) -> Tensor:
        each = [losses.attention_transfer(seen.maps_s[k], seen.maps_t[k]) for k in self.stages]
        return torch.stack(each).sum()


class PKT(Method):
    """Passalis & Tefas 2018."""

    def forward(self, seen: Seen) -> Tensor:
        return losses.pkt(seen.e_s, seen.e_t)


class SP(Method):
    """Tung & Mori 2019, of the last stage of each network."""

    needs = frozenset({"maps"})

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        _shared_stages(sizes)
        self.last_s, self.last_t = list(sizes.student_maps)[-1], list(sizes.teacher_maps)[-1]

    def forward(self, seen: Seen) -> Tensor:
        return losses.sp(seen.maps_s[self.last_s], seen.maps_t[self.last_t])


class RKD(Method):
    """Park et al. 2019."""

    def forward(self, seen: Seen) -> Tensor:
        return losses.rkd(seen.e_s, seen.e_t)


class CC(Method):
    """Peng et al. 2019, as RepDistiller has it: both embeddings behind linear layers to 128."""

    DIM = 128

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.embed_s = nn.Linear(sizes.student, self.DIM)
        self.embed_t = nn.Linear(sizes.teacher, self.DIM)

    def forward(self, seen: Seen) -> Tensor:
        with without_autocast(seen.e_s):
            d_s = self.embed_s(at_least_float32(seen.e_s))
            d_t = self.embed_t(at_least_float32(seen.e_t))
        return losses.cc(d_s, d_t)


class VID(Method):
    """Ahn et al. 2019: a regressor of three 1x1 convolutions and a variance per channel, a stage.

    Sizes as in RepDistiller: the teacher's channels from the first convolution on, no bias, the
    larger map averaged to the smaller.
    """

    needs = frozenset({"maps"})
    VARIANCE = 5.0  # at first

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.stages = _shared_stages(sizes)
        rho = math.log(math.expm1(self.VARIANCE - losses.VARIANCE_MIN))
        self.regressors, self.rho = nn.ModuleDict(), nn.ParameterDict()
        for k in self.stages:
            narrow, wide = sizes.student_maps[k], sizes.teacher_maps[k]
            self.regressors[k] = nn.Sequential(
                nn.Conv2d(narrow, wide, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(wide, wide, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(wide, wide, 1, bias=False),
            )
            self.rho[k] = nn.Parameter(torch.full((wide,), rho))

    def forward(self, seen: Seen) -> Tensor:
        each = []
        for k in self.stages:
            a, b = _pooled(seen.maps_s[k], seen.maps_t[k])
            with without_autocast(a):
                each.append(losses.vid(self.regressors[k](a), b, self.rho[k]))
        return torch.stack(each).sum()


class CRD(Method):
    """Tian et al. 2020: a memory of projected embeddings for each network, a row for each image.

    Linear layers bring both embeddings to unit vectors of 128. Every row starts as a random one and
    moves to unit(.5 row + .5 vector) whenever its image is in the batch, after the loss: the
    positive of an image is its row from before. Negatives are drawn anew for each image of a step,
    uniformly with replacement, from the rows that are not of its class (the authors' mode "exact",
    which repeats none where there are enough). A row's class is known once its image was seen, and
    before that the row is random and of no class.
    K: negatives of an image; one less than there are images at most.
    """

    K = 16384
    TAU = 0.07
    MOMENTUM = 0.5
    DIM = 128

    memory_s: Tensor
    memory_t: Tensor
    labels: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        if sizes.images < 2:
            raise ValueError(f"{sizes.images} training images: there are no negatives; give 2+")
        self.m = sizes.images
        self.k = min(self.K, self.m - 1)
        self.embed_s = nn.Linear(sizes.student, self.DIM)
        self.embed_t = nn.Linear(sizes.teacher, self.DIM)
        self.z_s = Normaliser("crd", m=self.m, tau=self.TAU)
        self.z_t = Normaliser("crd", m=self.m, tau=self.TAU)
        self.register_buffer("memory_s", unit(torch.randn(self.m, self.DIM)))
        self.register_buffer("memory_t", unit(torch.randn(self.m, self.DIM)))
        self.register_buffer("labels", torch.full((self.m,), -1))

    def forward(self, seen: Seen) -> Tensor:
        self.labels[seen.index] = seen.y
        with without_autocast(seen.e_s):
            v_s = unit(self.embed_s(at_least_float32(seen.e_s)))
            v_t = unit(self.embed_t(at_least_float32(seen.e_t)))
            drawn = self.negatives(seen.y, seen.generator)
            loss = self.loss(v_s, v_t, seen.index, drawn, seen.generator)
            # not in place: autograd still needs the rows that the scores were made of
            self.memory_s = self._moved(self.memory_s, seen.index, v_s)
            self.memory_t = self._moved(self.memory_t, seen.index, v_t)
        return loss

    def loss(
        self, v_s: Tensor, v_t: Tensor, index: Tensor, drawn: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Of unit vectors [B, 128], their images [B] and negatives [B, K], rows of the memories."""
        student = _to_rows(v_s, self.memory_t, index, drawn)
        teacher = _to_rows(v_t, self.memory_s, index, drawn)
        log_z = self.z_s(*student), self.z_t(*teacher)
        return losses.crd(student, teacher, tau=self.TAU, m=self.m, log_z=log_z)

    def negatives(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """[B, K] rows of the memories, none known to be of the class y [B]."""
        by_label = self.labels.sort(stable=True)
        first = torch.searchsorted(by_label.values, y)[:, None]
        own = torch.searchsorted(by_label.values, y, right=True)[:, None] - first
        u = torch.rand(len(y), self.k, generator=generator, device=y.device, dtype=torch.float64)
        drawn = (u * (self.m - own)).long()
        return by_label.indices[drawn + own * (drawn >= first)]

    def _moved(self, memory: Tensor, index: Tensor, v: Tensor) -> Tensor:
        new = self.MOMENTUM * memory[index] + (1 - self.MOMENTUM) * v.detach()
        return memory.index_copy(0, index, unit(new).to(memory.dtype))


class CRCD(CRD):
    """Zhu et al. 2021: as CRD, of relations to anchors: see losses.crcd.

    An image's anchors are the memory's rows of other images of the batch. The authors' code takes
    all B of them, its own row among them, whose relation to the positive has no direction; here
    ANCHORS others are drawn for each, whose mean has the same expectation over the others: B^2 K
    relations cost more than the student. A negative that is the anchor itself does not count.
    """

    K = 500
    TAU = 0.05
    ANCHORS = 4

    def loss(
        self, v_s: Tensor, v_t: Tensor, index: Tensor, drawn: Tensor, generator: torch.Generator
    ) -> Tensor:
        partners = [derangement(len(index), generator) for _ in range(self.ANCHORS)]
        anchors = index[torch.stack(partners, dim=1)]
        student = _to_relations(v_s, self.memory_t, index, drawn, anchors)
        teacher = _to_relations(v_t, self.memory_s, index, drawn, anchors)
        log_z = self.z_s(*student), self.z_t(*teacher)
        return losses.crcd(student, teacher, tau=self.TAU, m=self.m, log_z=log_z)


class DKD(Method):
    """Zhao et al. 2022."""

    needs = frozenset({"logits"})
    TEMPERATURE, TARGET, NON_TARGET = 4.0, 1.0, 8.0
    WARM_EPOCHS = 20

    def forward(self, seen: Seen) -> Tensor:
        loss = losses.dkd(seen.z_s, seen.z_t, seen.y, temperature=self.TEMPERATURE,
                          target=self.TARGET, non_target=self.NON_TARGET)  # fmt: skip
        return losses.warm_up(seen.epoch, self.WARM_EPOCHS) * loss


class AdaDistill(Method):
    """Boutros et al. 2024, with the scale and margin of the run's head.

    Centres start as small random rows, as in the authors' code; they move before the loss. Behind a
    linear layer where the embeddings differ in size (ours: theirs have one size).
    """

    centers: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.scale, self.margin = sizes.scale, sizes.margin
        self.project = _projector(sizes)
        self.register_buffer("centers", 0.01 * torch.randn(sizes.classes, sizes.teacher))

    def forward(self, seen: Seen) -> Tensor:
        with without_autocast(seen.e_s):
            e_s = self.project(at_least_float32(seen.e_s))
            self.centers = losses.moved_centers(self.centers, e_s, seen.e_t, seen.y)
        return losses.adadistill(e_s, self.centers, seen.y, scale=self.scale, margin=self.margin)


METHODS: dict[str, type[Method]] = {
    "cosine": Cosine,
    "kd": KD,
    "fitnet": FitNet,
    "at": AttentionTransfer,
    "pkt": PKT,
    "sp": SP,
    "rkd": RKD,
    "cc": CC,
    "vid": VID,
    "crd": CRD,
    "crcd": CRCD,
    "dkd": DKD,
    "adadistill": AdaDistill,
}


def _to_rows(v: Tensor, memory: Tensor, index: Tensor, drawn: Tensor) -> losses.Side:
    """Cosines of v [B, d] to the memory's rows of its own images [B], and to those drawn [B, K]."""
    return (v * memory[index]).sum(1), nce_scores(v, memory, drawn)


def _to_relations(
    v: Tensor, memory: Tensor, index: Tensor, drawn: Tensor, anchors: Tensor
) -> losses.Side:
    """As `_to_rows`, of relations to anchors [B, A]: [B A] and [B A, K].

    From inner products, so that no relation is ever held. No gradient reaches the memory.
    """
    b, a = anchors.shape
    rows, own = memory[anchors], memory[index]
    qa = (rows @ v[:, :, None])[:, :, 0]
    own_a = (rows @ own[:, :, None])[:, :, 0]
    positive = losses.relation_cosines((v * own).sum(1)[:, None], qa, own_a)
    drawn_a = nce_scores(rows.flatten(0, 1), memory, drawn.repeat_interleave(a, 0)).view(b, a, -1)
    qk = nce_scores(v, memory, drawn)[:, None]
    negatives = losses.relation_cosines(qk, qa[:, :, None], drawn_a)
    # a score of -inf costs nothing and has no gradient
    itself = drawn[:, None] == anchors[:, :, None]
    return positive.flatten(), negatives.masked_fill(itself, -torch.inf).flatten(0, 1)


def _projector(sizes: Sizes) -> nn.Module:
    if sizes.student == sizes.teacher:
        return nn.Identity()
    return nn.Linear(sizes.student, sizes.teacher, bias=False)


def _shared_stages(sizes: Sizes, *wanted: str) -> list[str]:
    """Names of the stages that both networks have. Raises ValueError where one is wanting."""
    both = [k for k in sizes.student_maps if k[:-1] == "stage" and k in sizes.teacher_maps]
    if not both or not set(wanted) <= set(both):
        raise ValueError(
            f"student has maps {', '.join(sizes.student_maps) or 'none'} and teacher "
            f"{', '.join(sizes.teacher_maps) or 'none'}: this method needs "
            f"{', '.join(wanted) or 'a stage'} of both; take other networks, or leave it out"
        )
    return both


def _pooled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of student and teacher in float32, the larger averaged to the size of the smaller."""
    a, b = at_least_float32(a), at_least_float32(b)
    if a.shape[2:] != b.shape[2:]:  # the gradient of pooling is not deterministic on CUDA
        size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
        a, b = F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)
    return a, b


@torch.no_grad()
def _channels(recogniser: Recogniser, size: int) -> dict[str, int]:
    """Channels of each map, found by one image."""
    device, training = next(recogniser.parameters()).device, recogniser.training
    _, maps = recogniser.eval()(torch.zeros(1, 3, size, size, device=device), maps=True)
    recogniser.train(training)
    return {name: map_.shape[1] for name, map_ in maps.items()}
