"""BTNet (Sec. 3.2): one trunk, and for each smaller resolution a branch of which a delta is stored.

S: canonical side, the trunk's input. A branch B_r is the trunk from its input to the first part
whose output has side r, without the strides before it; T_r is the rest of the trunk. What differs
from the trunk, and is stored, is B_r and every batch norm of T_r.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shared.config import Data
from shared.data.pipeline import normalise
from shared.degrade import Kernel, to_float, to_uint8
from shared.models import checkpoints, count_parameters, create, macs
from shared.models.cifar import BasicBlock
from shared.models.embedding import SmallNet
from shared.models.iresnet import IResNet, Unit

Batchnorms = Literal["paper", "official"]
Indicator = Literal["max", "min", "avg"]
Rounding = Literal["ceil", "near", "floor"]


# -- the trunk in parts --------------------------------------------------------------------------


def parts(trunk: nn.Module) -> list[tuple[str, nn.Module]]:
    """A trunk in the order of its forward pass, less its head: "stem", "stage1.1", "stage1.2", ...

    Each takes the map of the one before it. Raises ValueError for a network without such parts.
    """
    if isinstance(trunk, IResNet) and trunk.input == "native":
        found: list[tuple[str, nn.Module]] = [
            ("stem", nn.Sequential(trunk.conv1, trunk.bn1, trunk.prelu))
        ]
        found += [
            (f"stage{i}.{j}", unit)
            for i, stage in enumerate(trunk.stages, start=1)
            for j, unit in enumerate(stage, start=1)
        ]
        return found
    if isinstance(trunk, SmallNet):
        stages = enumerate(trunk.stages, start=1)
        return [("stem", trunk.stem), *((f"stage{i}.1", block) for i, block in stages)]
    raise ValueError(
        f"{type(trunk).__name__} cannot be a trunk: take an iresnet of native input "
        "(iresnet50, small-iresnet), or small-teacher"
    )


def sides(trunk: nn.Module) -> list[int]:
    """Side in px of each part's output, for the trunk's own input of S x S; nothing is computed."""
    s = int(trunk.size)  # type: ignore[arg-type]
    x = torch.empty(2, 3, s, s, device="meta")
    found = []
    for _, part in parts(trunk):
        weights = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        bare = {name: torch.empty_like(w, device="meta") for name, w in weights.items()}
        x = torch.func.functional_call(part, bare, (x.to(next(part.parameters()).dtype),))
        found.append(x.shape[-1])
    return found


def trunk_map(trunk: nn.Module, x: Tensor, at: int) -> Tensor:
    """z_s of Eq. 2: what the trunk's part number `at` (from 0) makes of [B, 3, S, S]; the later
    parts are not run."""
    for _, part in parts(trunk)[: at + 1]:
        x = part(x)
    return x


# -- a branch ------------------------------------------------------------------------------------


class Branch(nn.Module):
    """T_r(B_r(x)): a network for normalised [B, 3, r, r], most of which may be the trunk itself.

    trunk: IResNet or SmallNet for S x S. Weights that are not this branch's own are the trunk's
        Parameter objects, not copies; they are frozen here, in the trunk therefore too.
    resolution: r, below S, a side of some part's output (`sides`).
    end: number of the last part that is the branch's own; default: the first one of side r. Also
        its own: every batch norm, and with end = len(parts(trunk)) everything, head included; of a
        fresh trunk that is a network of the branch's shape trained from scratch (phi_mm).
    bn: "official" leaves weights and biases of two kinds of T_r's batch norms with the trunk, which
        the published code's freezing by name misses: those of shortcuts and the embedding's own.
        Their running statistics are the branch's.

    Up to side r all strides are 1. Where an own part's shortcut then keeps the shape it is the
    identity, as in the published code. Own parameters start as copies of the trunk's.

    The face is that of every network: `features(x)`, `forward(x)` -> (embedding [B, D], {"z": z_r
    [B, C, h, w]}), `dim`, `classes` None. z_r is the output of part `at`, the first one of side r
    or the last own one, whichever is later. state_dict() has what is stored and nothing else, under
    the trunk's names; `load_state_dict` takes that, also with strict=True.

    Raises ValueError for a resolution or an end that the trunk has not.
    """

    classes = None

    def __init__(
        self,
        trunk: nn.Module,
        resolution: int,
        *,
        end: int | None = None,
        bn: Batchnorms = "paper",
    ) -> None:
        super().__init__()
        reach = _reach(trunk, resolution)
        pieces = [part for _, part in parts(trunk)]
        end = reach if end is None else end
        if not 0 <= end <= len(pieces):
            raise ValueError(f"a branch ends at part 0 to {len(pieces)} of its trunk, not at {end}")
        if bn not in get_args(Batchnorms):
            raise ValueError(f"no bn {bn!r}; there are: paper, official")
        own = _own_parameters(trunk, pieces, end, bn)
        shared = [p for p in trunk.parameters() if id(p) not in own]
        self.network: Any = copy.deepcopy(trunk, {id(p): p for p in shared})
        self.resolution, self.end, self.bn = resolution, end, bn
        self.at = min(max(end, reach), len(pieces) - 1)
        for number, (_, part) in enumerate(parts(self.network)[: reach + 1]):
            _unstride(part, own=number <= end)
        ids = {id(p) for p in shared}
        for name, p in self.network.named_parameters():
            fixed = name in trunk.fixed  # type: ignore[operator]
            p.requires_grad_(id(p) not in ids and not fixed)
        state = self.network.state_dict(keep_vars=True)
        self.shared = frozenset(name for name, value in state.items() if id(value) in ids)
        self.register_state_dict_post_hook(_only_stored)
        self.register_load_state_dict_pre_hook(_with_shared)

    @property
    def dim(self) -> int:
        return self.network.dim

    @property
    def stored_parameters(self) -> int:
        """Parameters that a delta holds; running statistics are not counted."""
        state = self.network.state_dict(keep_vars=True)
        stored = [value for name, value in state.items() if name not in self.shared]
        return sum(value.numel() for value in stored if isinstance(value, nn.Parameter))

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, r, r] -> [B, dim]; ValueError for another size."""
        return self(x)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, 3, r, r] -> ([B, dim], {"z": z_r}); ValueError for another size."""
        r = self.resolution
        if x.shape[1:] != (3, r, r):
            raise ValueError(f"expected images [B, 3, {r}, {r}], got {list(x.shape)}: resize them")
        maps = {}
        for number, (_, part) in enumerate(parts(self.network)):
            x = part(x)
            if number == self.at:
                maps["z"] = x
        return self.network.head(x), maps


def _reach(trunk: nn.Module, resolution: int) -> int:
    """Number of the first part whose output has side `resolution`."""
    there, s = sides(trunk), int(trunk.size)  # type: ignore[arg-type]
    if resolution not in there or resolution >= s:
        fit = ", ".join(str(side) for side in sorted(set(there)) if side < s)
        raise ValueError(f"no branch of {resolution} px: a trunk for {s} px has them at {fit} px")
    return there.index(resolution)


def _own_parameters(
    trunk: nn.Module, pieces: Sequence[nn.Module], end: int, bn: Batchnorms
) -> set[int]:
    """Ids of the trunk's parameters that a branch has of its own."""
    if end == len(pieces):
        return {id(p) for p in trunk.parameters()}
    own = {id(p) for part in pieces[: end + 1] for p in part.parameters()}
    for name, module in trunk.named_modules():
        missed = "downsample" in name or isinstance(module, nn.BatchNorm1d)
        if isinstance(module, _BatchNorm) and not (bn == "official" and missed):
            own |= {id(p) for p in module.parameters()}
    return own


def _unstride(part: nn.Module, *, own: bool) -> None:
    """Stride 1 throughout; an own part's shortcut goes where it then keeps the shape."""
    for module in part.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            module.stride = (1, 1)
    if own and isinstance(part, Unit | BasicBlock):
        shortcut = next((m for m in part.downsample.modules() if isinstance(m, nn.Conv2d)), None)
        if shortcut is None or shortcut.in_channels == shortcut.out_channels:
            part.downsample = nn.Identity()


def _only_stored(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    inside = f"{prefix}network."
    for name in [name for name in state if name.startswith(inside)]:
        value, plain = state.pop(name), name.removeprefix(inside)
        if plain not in module.shared:
            state[prefix + plain] = value


def _with_shared(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}network.{name.removeprefix(prefix)}"] = state.pop(name)
    whole = module.network.state_dict()
    state.update({f"{prefix}network.{name}": whole[name] for name in module.shared})


# -- the router ----------------------------------------------------------------------------------


def select_branch(
    width: int,
    height: int,
    indicator: Indicator = "max",
    rounding: Rounding = "ceil",
    resolutions: Sequence[int] = (7, 14, 28, 112),
) -> int:
    """The resolution at which an image of width x height px is looked at (Sec. 3.2, step 1).

    indicator: r' is the longer side, the shorter one, or "avg", their mean rounded down.
    rounding: "ceil" takes the smallest resolution not below r', else the largest there is; "floor"
        the largest not above it, else the smallest; "near" the nearest, of two the lower.
    Raises ValueError for a side below 1, other words, and no resolutions.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} px: every side must be at least 1 px")
    if indicator not in get_args(Indicator):
        raise ValueError(f"no indicator {indicator!r}; there are: max, min, avg")
    if rounding not in get_args(Rounding):
        raise ValueError(f"no rounding {rounding!r}; there are: ceil, near, floor")
    if not resolutions:
        raise ValueError("no resolutions to choose from: give at least one")
    side = (width + height) // 2
    if indicator != "avg":
        side = max(width, height) if indicator == "max" else min(width, height)
    if rounding == "near":
        return min(resolutions, key=lambda r: (abs(r - side), r))
    if rounding == "ceil":
        return min((r for r in resolutions if r >= side), default=max(resolutions))
    return max((r for r in resolutions if r <= side), default=min(resolutions))


# -- the whole -----------------------------------------------------------------------------------


class BTNet(nn.Module):
    """One trunk and its branches: images of any size to embeddings [B, D] that can be compared.

    resolutions: in px; the largest is S, the trunk's own.
    trunk: IResNet or SmallNet for S x S; None: iresnet50. It is frozen here and always in
        evaluation mode: each delta was trained against its numbers.
    indicator, rounding: of `select_branch`.
    kernel, antialias: one resize for everything, up and down, rounded to 8 bits as LR files are.
    mean, std: of RGB in [0, 1]; bn: see `Branch`.
    Raises ValueError for resolutions that the trunk has not, and unknown words.
    """

    def __init__(
        self,
        resolutions: Sequence[int] = (7, 14, 28, 112),
        trunk: nn.Module | None = None,
        *,
        indicator: Indicator = "max",
        rounding: Rounding = "ceil",
        kernel: Kernel = "bilinear",
        antialias: bool = True,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        bn: Batchnorms = "paper",
    ) -> None:
        super().__init__()
        if kernel not in get_args(Kernel):
            raise ValueError(f"no kernel {kernel!r}; there are: {', '.join(get_args(Kernel))}")
        select_branch(1, 1, indicator, rounding, resolutions)  # for what it refuses
        self.trunk: Any = create("iresnet50") if trunk is None else trunk
        parts(self.trunk)  # likewise
        self.resolutions = tuple(sorted(set(resolutions)))
        if self.resolutions[-1] != self.trunk.size:
            raise ValueError(
                f"resolutions {self.resolutions}: the largest must be {self.trunk.size} px, "
                "the trunk's own"
            )
        self.indicator, self.rounding, self.bn = indicator, rounding, bn
        self.data = Data(kernel=kernel, antialias=antialias, mean=mean, std=std)
        self.trunk.requires_grad_(False)
        self.branches = nn.ModuleDict(
            {str(r): Branch(self.trunk, r, bn=bn) for r in self.resolutions[:-1]}
        )
        self.train(self.training)

    def train(self, mode: bool = True) -> BTNet:
        super().train(mode)
        self.trunk.eval()
        return self

    @property
    def dim(self) -> int:
        return self.trunk.dim

    def network(self, r: int) -> nn.Module:
        """The branch of resolution r, or the trunk. Raises ValueError for another r."""
        if r not in self.resolutions:
            there = ", ".join(map(str, self.resolutions))
            raise ValueError(f"no network for {r} px; there are those for {there} px")
        return self.trunk if r == self.resolutions[-1] else self.branches[str(r)]

    def route(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """The resolution for each (width, height) in px."""
        return [
            select_branch(w, h, self.indicator, self.rounding, self.resolutions) for w, h in sizes
        ]

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Embeddings [B, D] in the order of the images, each of them routed by its own size.

        images: [B, C, H, W], or a sequence of [C, h, w] or [h, w] of any sizes; C is 1 or 3, values
        are uint8 or float in [0, 1]. Proportions are not kept: a branch sees r x r px. To rounding
        an embedding does not depend on what else is in the batch (in evaluation mode).
        Raises ValueError for other shapes and types.
        """
        if isinstance(images, Tensor):
            if images.ndim != 4:
                raise ValueError(f"images are {list(images.shape)}: give [B, C, H, W] or a list")
            (r,) = self.route([(images.shape[3], images.shape[2])])
            return self.embed(self.prepare(images, r), r)
        images = [_checked(image, f"image {i}") for i, image in enumerate(images)]
        if not images:
            return next(self.parameters()).new_zeros(0, self.dim)
        routed = self.route([(image.shape[2], image.shape[1]) for image in images])

        def embedded(rows: list[int]) -> Tensor:
            r = routed[rows[0]]
            return self.embed(self.prepare([images[i] for i in rows], r), r)

        return _by_group(routed, embedded)

    def prepare(self, images: Tensor | Sequence[Tensor], r: int) -> Tensor:
        """Normalised [B, 3, r, r] on the model's device, whatever their sizes; see `forward`."""
        device = next(self.parameters()).device
        if isinstance(images, Tensor):
            resized = self._resized(_checked(images, "images", ndim=4).to(device), r)
        else:
            checked = [_checked(image, f"image {i}") for i, image in enumerate(images)]

            def made(rows: list[int]) -> Tensor:  # of images of one size: a call for all
                return self._resized(torch.stack([checked[i] for i in rows]).to(device), r)

            resized = _by_group([(image.shape, image.dtype) for image in checked], made)
        return normalise(to_uint8(resized), self.data)

    def embed(self, x: Tensor, r: int) -> Tensor:
        """Normalised [B, 3, r, r] -> [B, D] through the network of resolution r."""
        return self.network(r)(x)[0]

    def _resized(self, images: Tensor, r: int) -> Tensor:
        """[B, C, H, W] -> RGB float32 [B, 3, r, r], of [0, 1] but for a kernel's overshoot."""
        images = images.float() if images.is_floating_point() else to_float(images)
        if images.shape[2:] != (r, r):
            smooth = self.data.kernel in ("bicubic", "bilinear")  # the others know no antialias
            options = dict(align_corners=False, antialias=self.data.antialias) if smooth else {}
            images = F.interpolate(images, (r, r), mode=self.data.kernel, **options)
        return images.expand(-1, 3, -1, -1)

    # -- what is stored, and what it costs --

    def branch_state_dict(self, r: int) -> OrderedDict[str, Tensor]:
        """The delta of branch r: B_r and the batch norms of T_r, under the trunk's names.

        Its `_metadata` has the trunk's fingerprint. Raises ValueError for S: the trunk has none.
        """
        state: Any = self._branch(r).state_dict()  # an OrderedDict, though typed as a dict
        state._metadata[""]["trunk"] = self.trunk_fingerprint()
        return state

    def load_branch_state_dict(self, r: int, state: OrderedDict[str, Tensor]) -> None:
        """Takes what `branch_state_dict` gave. Raises ValueError, and changes nothing, for another
        trunk's (where `state` says whose it is) and for other names or shapes."""
        branch = self._branch(r)
        theirs = getattr(state, "_metadata", {}).get("", {}).get("trunk")
        self._agrees(f"a delta for {r} px", {"trunk": theirs} if theirs else {}, r)
        expected = {name: tuple(value.shape) for name, value in branch.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        names = sorted(expected.keys() | found.keys())
        odd = [name for name in names if expected.get(name) != found.get(name)]
        if odd:
            first = f"{odd[0]} is {found.get(odd[0])} instead of {expected.get(odd[0])}"
            more = f", and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise ValueError(f"a delta for {r} px that does not fit this network: {first}{more}")
        branch.load_state_dict(state)

    def save_branch(self, r: int, path: str | os.PathLike[str]) -> None:
        """Writes the delta as safetensors, whole or not at all, with what it belongs to."""
        branch = self._branch(r)
        facts = self._belongs(r) | {"end": str(branch.end)}
        checkpoints.save_safetensors(branch, path, facts)

    def load_branch(self, path: str | os.PathLike[str]) -> int:
        """Takes what `save_branch` wrote; returns its resolution. Raises ValueError for a file that
        is none, of another trunk, resize or resolution; FileNotFoundError where there is none."""
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file: {error}") from None
        if not metadata.get("resolution", "").isdecimal():
            raise ValueError(f"{path} is no branch: it names no resolution; see save_branch")
        r = int(metadata["resolution"])
        try:
            self._agrees("its", {key: metadata.get(key, "?") for key in self._belongs(r)}, r)
            end = int(metadata.get("end", self._branch(r).end))
            if end != self._branch(r).end:  # one that ends elsewhere (Fig. 7)
                own = Branch(self.trunk, r, end=end, bn=self.bn).train(self.training)
                self.branches[str(r)] = own.to(next(self.trunk.parameters()).device)
            self.load_branch_state_dict(r, state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return r

    def trunk_fingerprint(self) -> str:
        """16 hex digits that name the trunk's numbers."""
        found = hashlib.sha256()
        for name, value in self.trunk.state_dict().items():
            found.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
            found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()[:16]

    def stored_parameters(self, r: int) -> int:
        """Parameters that resolution r costs to store; of S those of the whole trunk."""
        network = self.network(r)
        if isinstance(network, Branch):
            return network.stored_parameters
        return count_parameters(network)

    def macs(self, r: int) -> int:
        """Multiply-accumulates of one image at resolution r (shared.models.macs)."""
        return macs(self.network(r), r)

    def _branch(self, r: int) -> Branch:
        network = self.network(r)
        if not isinstance(network, Branch):
            raise ValueError(f"{r} px is the trunk itself: it has no delta")
        return network

    def _belongs(self, r: int) -> dict[str, str]:
        return {
            "resolution": str(r),
            "trunk": self.trunk_fingerprint(),
            "size": str(self.trunk.size),
            "bn": self.bn,
            "kernel": self.data.kernel,
            "antialias": str(self.data.antialias),
            "mean": str(self.data.mean),
            "std": str(self.data.std),
        }

    def _agrees(self, what: str, theirs: dict[str, str], r: int) -> None:
        self._branch(r)
        if not theirs:
            return
        for key, ours in self._belongs(r).items():
            if theirs.get(key, ours) != ours:
                raise ValueError(
                    f"{what} {key} is {theirs[key]}, this model's {ours}: load it where it belongs"
                )


def _checked(image: Tensor, what: str, ndim: int = 3) -> Tensor:
    """[C, h, w], also of [h, w]; with ndim 4 [B, C, h, w]. ValueError for what is no image."""
    if not isinstance(image, Tensor):
        raise ValueError(f"{what}: a {type(image).__name__}; give a tensor [C, h, w]")
    if ndim == 3 and image.ndim == 2:
        image = image[None]
    if image.ndim != ndim or image.shape[-3] not in (1, 3) or 0 in image.shape[-2:]:
        raise ValueError(
            f"{what}: {list(image.shape)} is no {'[B, C, h, w]' if ndim == 4 else '[C, h, w]'} "
            "of 1 or 3 channels"
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"{what}: {image.dtype}; give uint8, or float in [0, 1]")
    # on a GPU a look at the values would make the host wait for it
    if image.is_floating_point() and image.device.type == "cpu" and not image.abs().max() < 16:
        raise ValueError(
            f"{what}: values up to {float(image.abs().max()):g}; give float in [0, 1], or uint8"
        )
    return image


def _by_group(keys: Sequence[Hashable], made: Callable[[list[int]], Tensor]) -> Tensor:
    """made(rows) [n, ...] of the rows of each key, all put back in the order of the keys."""
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    found = torch.cat([made(rows) for rows in groups.values()])
    order = torch.tensor([row for rows in groups.values() for row in rows])
    return found[order.argsort().to(found.device)]


def aggregate(
    embeddings: Tensor, ids: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Multi-resolution feature aggregation: (templates [I, D], ids [I] ascending).

    A template is the sum of an identity's embeddings, whatever branches they are from; weights [N]:
    the weighted sum. embeddings: [N, D], raw; ids: [N]. Raises ValueError for other shapes.
    """
    rows = embeddings.shape[:1]
    if embeddings.ndim != 2 or ids.shape != rows or (weights is not None and weights.shape != rows):
        raise ValueError(
            f"aggregate: embeddings {list(embeddings.shape)}, ids {list(ids.shape)}"
            + (f", weights {list(weights.shape)}" if weights is not None else "")
            + ": give [N, D] and one id (and weight) a row"
        )
    people, which = ids.unique(return_inverse=True)
    weighted = embeddings if weights is None else embeddings * weights[:, None].to(embeddings)
    templates = weighted.new_zeros(len(people), embeddings.shape[1])
    return templates.index_add_(0, which.to(embeddings.device), weighted), people
