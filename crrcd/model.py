"""What CRRCD adds to a student while it is trained; thrown away afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.kernels import relation_scores

Policy = Literal["supervised", "unsupervised"]


class RelationModule(nn.Module):
    """F(a, b) = phi(relu(phi_i a - phi_j b)): a relation vector (Sec. III-A).

    dim_i, dim_j: sizes of a and b. d: size of the relation.
    """

    def __init__(self, dim_i: int, dim_j: int, d: int = 128) -> None:
        super().__init__()
        self.phi_i = nn.Linear(dim_i, d)
        self.phi_j = nn.Linear(dim_j, d)
        self.phi = nn.Linear(d, d)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a: [B, dim_i], b: [B, dim_j] -> [B, d]."""
        return self.phi(F.relu(self.phi_i(a) - self.phi_j(b)))


class RelationCritic(nn.Module):
    """F^t, F^{t,s} (Eq. 1) and h_1, h_2 (Eq. 10): cosines of relations across the spaces."""

    def __init__(self, dim_t: int, dim_s: int, d: int = 128) -> None:
        super().__init__()
        self.F_t = RelationModule(dim_t, dim_t, d)
        self.F_ts = RelationModule(dim_t, dim_s, d)
        self.h1, self.h2 = nn.Linear(d, d), nn.Linear(d, d)

    def forward(
        self, e_t: Tensor, e_s: Tensor, partner: Tensor, queue: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosines of the positive [B] and of the negatives [B, n], in float32 also under autocast.

        e_t: [B, D_t], e_s: [B, D_s] of samples j. partner: [B, D_t], teacher features of i != j.
        queue: [M, D_t] teacher features, index: [B, n] of them as the k of v^t_{i,k}.
        query = norm(h_2 F^{t,s}(e^t_i, e^s_j)); keys = norm(h_1 F^t(e^t_i, e^t_j or e^t_k)).
        """
        with torch.autocast(e_s.device.type, enabled=False):
            e_s = e_s.to(torch.promote_types(e_s.dtype, torch.float32))
            query = F.normalize(self.h2(self.F_ts(partner, e_s)), dim=-1)
            # phi and h_1 are linear after linear: one matrix and one bias
            weight = self.F_t.phi.weight.T @ self.h1.weight.T
            bias = self.h1(self.F_t.phi.bias)
            bank = self.F_t.phi_j(torch.cat([e_t, queue]))
            own = torch.arange(len(e_t), device=e_t.device)[:, None]
            index = torch.cat([own, index + len(e_t)], dim=1)
            cosines = relation_scores(query, self.F_t.phi_i(partner), bank, index, weight, bias)
        return cosines[:, 0], cosines[:, 1:]


class FeatureQueue(nn.Module):
    """The latest teacher features with label and data-set index, oldest out: the negatives.

    Fixed shapes and no wait for the device, so it can be captured in a CUDA graph. Its whole state
    is in its state dict. size: M. dim: D_t.
    """

    features: Tensor
    labels: Tensor
    index: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(size, dim))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("index", torch.full((size,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def fill(
        self,
        teacher: Callable[[Tensor], tuple[Tensor, Tensor]],
        images: Iterable[tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        """Push teacher features of (index, x_h, label) batches: before step 1, so never empty."""
        for index, x_h, labels in images:
            self.push(teacher(x_h)[0], labels, index)
        if self.labels.min() == self.labels.max():
            raise ValueError("the queue holds a single class: there are no supervised negatives")

    def push(self, features: Tensor, labels: Tensor, index: Tensor) -> None:
        """Enqueue [B, D_t] features with labels [B] and data-set indices [B]; B at most M."""
        size, b = len(self.labels), len(labels)
        if b > size:
            raise ValueError(f"a batch of {b} does not fit into a queue of {size}")
        at = (self.pointer + torch.arange(b, device=self.pointer.device)) % size
        self.features[at] = features.detach().to(self.features)
        self.labels[at] = labels.to(self.labels)
        self.index[at] = index.to(self.index)
        self.pointer.add_(b).remainder_(size)

    def sample(
        self,
        labels: Tensor,
        n: int,
        *,
        exclude: Tensor,
        policy: Policy = "supervised",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Queue positions [B, n], uniform with replacement over what is allowed for each row.

        supervised: entries of another class than labels [B], and not of data-set index
        exclude [B] (the partner). unsupervised: only entries of index exclude [B] (the sample
        itself) are barred. Where nothing is allowed the draw is from the whole queue.
        """
        size = len(self.labels)
        # Sorted by (label, index), what is barred is at most two runs: the class, and one image.
        by_index = self.index.sort(stable=True)
        near = torch.searchsorted(by_index.values, exclude.to(self.index)).clamp(max=size - 1)
        known = by_index.values[near] == exclude
        label = torch.where(known, self.labels[by_index.indices[near]], -2)
        order = by_index.indices[self.labels[by_index.indices].argsort(stable=True)]
        keys = self.labels[order] * _SPAN + self.index[order]

        image_from = torch.searchsorted(keys, label * _SPAN + exclude)
        image_to = torch.searchsorted(keys, label * _SPAN + exclude, right=True)
        class_from = torch.searchsorted(keys, labels * _SPAN)
        class_to = torch.searchsorted(keys, (labels + 1) * _SPAN)
        if policy == "unsupervised":
            class_from = class_to = torch.zeros_like(class_from)
        inside = (image_from >= class_from) & (image_to <= class_to)  # the image's run adds nothing
        image_to = torch.where(inside, image_from, image_to)

        first = torch.where(image_from < class_from, image_from, class_from)
        second = torch.where(image_from < class_from, class_from, image_from)
        n_image, n_class = image_to - image_from, class_to - class_from
        n_first = torch.where(image_from < class_from, n_image, n_class)
        n_second = n_image + n_class - n_first
        allowed = size - n_image - n_class
        none = allowed <= 0
        u = torch.rand(len(labels), n, generator=generator, device=keys.device, dtype=torch.float64)
        draw = (u * torch.where(none, size, allowed)[:, None]).long()
        skip_first = (draw >= first[:, None]) & ~none[:, None]
        draw = draw + skip_first * n_first[:, None]
        skip_second = (draw >= second[:, None]) & ~none[:, None]
        draw = draw + skip_second * n_second[:, None]
        return order[draw]


_SPAN = 1 << 40  # above any data-set index: (label, index) as one int64
