"""The networks of a run: what each arm starts from, what is read from a finished run, and what is
asked for embeddings at each resolution."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from btnet.config import BRANCHES, TRUNKS, Arm, Config, arms
from btnet.model import Branch, BTNet, parts
from btnet.views import down_up, draw_sizes
from shared import cli
from shared.config import Data, locate
from shared.data.pipeline import normalise
from shared.degrade import low
from shared.models import count_parameters, macs
from shared.models.checkpoints import save_safetensors
from shared.models.heads import CosineHead
from shared.models.recogniser import HEADS, Recogniser, begin, read_metadata, restore, save
from shared.run import Run
from shared.teacher import FrozenTeacher

# Fields of Data that another run's trunk must have been trained with.
_ALIKE = ("name", "hr", "kernel", "antialias", "flip", "shift", "shift_step", "pad", "crop", "mean",
          "std", "landmarks", "margin", "development", "seed", "identities", "instances", "coarse",
          "fine")  # fmt: skip


# -- training ------------------------------------------------------------------------------------


def take_trunk(run: Run, config: Config, classes: int) -> None:
    """Copy the trunk of --trunk-run into this run, which then needs not train it.

    Raises ValueError where it is not there, another network, or trained on other data.
    """
    folder = _named(config.trunk_run)
    theirs = cli.stored(Config, folder)
    differ = [f"--data.{k}" for k in _ALIKE if getattr(theirs.data, k) != getattr(config.data, k)]
    differ += [f"--{k}" for k in ("student", "sizes") if getattr(theirs, k) != getattr(config, k)]
    differ = [flag.replace("_", "-") for flag in differ]
    source = _student_file(folder, config.trunk)
    if (known := int(read_metadata(source)["classes"])) != classes and not differ:
        differ = [f"{known} classes, not {classes}"]
    if differ:
        raise ValueError(f"--trunk-run {folder}: trained otherwise ({', '.join(differ)})")
    target = run.folder / "students" / source.name
    if run.rank == 0 and not target.exists():
        target.parent.mkdir(exist_ok=True)
        part = target.with_suffix(".part")
        shutil.copyfile(source, part)
        part.replace(target)
    run.broadcast(None)


def check(config: Config) -> None:
    """What can be known before anything is trained. Raises ValueError, naming the flag."""
    for row in TRUNKS:
        if row in arms(config):
            draw_sizes(row, config.data.hr, 0, torch.arange(1), 0, count=config.sizes)
    with torch.device("meta"):
        trunk = Recogniser(config.student, config.data.hr, 1).backbone
        hr = Recogniser(config.teacher, config.data.hr, 1).backbone
        for flag, network in (("student", trunk), ("teacher", hr)):
            try:
                parts(network)
            except ValueError as error:
                name = getattr(config, flag).name
                raise ValueError(f"--{flag}.name {name}: {error}") from None
        if trunk.dim != hr.dim and {"hr", "mm"} & {*config.students}:
            raise ValueError(
                f"--student.name {config.student.name} and --teacher.name {config.teacher.name}: "
                f"embeddings of {trunk.dim} and {hr.dim} numbers cannot be compared"
            )
        for arm in arms(config).values():
            if arm.mixed is None:
                try:
                    branch_of(trunk, arm, config)
                except ValueError as error:
                    flag = "" if str(error).startswith("--") else "--resolutions: "
                    raise ValueError(f"{flag}{error}") from None
    if config.start_run:
        earlier = _named(config.start_run)
        theirs = cli.stored(Config, earlier)
        same = {
            "--student.name": theirs.student.name == config.student.name,
            "--data.hr": theirs.data.hr == config.data.hr,
            "--end": theirs.end == config.end,
            "--bn": theirs.bn == config.bn,
        }
        if differ := [flag for flag, equal in same.items() if not equal]:
            raise ValueError(f"--start-run {earlier}: of other networks ({', '.join(differ)})")
        _student_file(earlier, theirs.trunk)
        for name, arm in arms(config).items():
            if arm.from_trunk:
                _student_file(earlier, name)


def keep_hr(run: Run, hr: FrozenTeacher, **metadata: object) -> None:
    """phi_hr into the run's folder, so that eval.py finds it."""
    path = run.folder / "students" / "hr.safetensors"
    if run.rank == 0 and not path.exists():
        path.parent.mkdir(exist_ok=True)
        save(hr.recogniser, path, **{k: str(v) for k, v in metadata.items()})


def trunk_of(folder: Path, config: Config) -> Recogniser:
    """A run's finished trunk with its classifier kappa*, frozen, in evaluation mode."""
    path = _student_file(folder, config.trunk)
    recogniser = Recogniser(config.student, config.data.hr, int(read_metadata(path)["classes"]))
    restore(recogniser, path)
    return recogniser.eval().requires_grad_(False)


def started(
    run: Run, config: Config, arm: Arm, classes: int, trunk: Recogniser | None
) -> Recogniser:
    """An arm's network as it is before its first step, on the run's device.

    Its backbone is a Branch but for a trunk. A trunk's classifier that is fixed gets no gradient.
    """
    student = begin(run, config.student, config.data.hr, classes)
    earlier = _named(config.start_run) if config.start_run else None
    if arm.row in TRUNKS:
        if earlier:
            known = trunk_of(earlier, cli.stored(Config, earlier))
            student.backbone.load_state_dict(known.backbone.state_dict())
        return run.place(student)
    if not arm.from_trunk:
        base = student.backbone
    else:
        assert trunk is not None
        base = trunk.backbone
        student.head = influence(trunk, config).requires_grad_(not arm.fixed_classifier)
    branch = branch_of(base, arm, config)
    if earlier and arm.from_trunk:
        restore(branch, _student_file(earlier, f"{arm.row}-{arm.resolution}"))
    student.backbone = branch
    return run.place(student)


def branch_of(base: nn.Module, arm: Arm, config: Config) -> Branch:
    """An arm's branch of a trunk's backbone. Raises ValueError for an --end that it has not."""
    names = [name for name, _ in parts(base)] + ["head"]
    if arm.end and arm.end not in names:
        raise ValueError(
            f"--end {arm.end}: {config.student.name} has no such part ({', '.join(names)})"
        )
    end = names.index(arm.end) if arm.end else None
    return Branch(base, arm.resolution, end=end, bn=config.bn)


def influence(trunk: Recogniser, config: Config) -> nn.Module:
    """Eq. 1: the loss of the branches, on a copy of the trunk's classifier kappa*."""
    head = copy.deepcopy(trunk.head)
    assert isinstance(head, CosineHead)
    if config.influence != "trunk":
        other = HEADS[config.influence](
            head.dim, head.classes, scale=head.scale, margin=config.influence_margin or head.margin
        )
        other.weight = head.weight
        if type(other) is type(head):  # CurricularFace's t goes on
            other.load_state_dict(head.state_dict())
        return other
    if config.influence_margin:
        head.margin = config.influence_margin
    return head


# -- a finished run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A network asked about images of `size` px: uint8 HR [B, 3, S, S] -> [B, D].

    enlarged: it takes HR images, so that the small ones are brought back to S px first.
    """

    network: nn.Module
    data: Data
    size: int
    enlarged: bool

    def __call__(self, pixels: Tensor) -> Tensor:
        c = self.data
        pixels = pixels.to(next(self.network.parameters()).device)
        if self.enlarged:
            small = down_up(pixels, self.size, c)
        else:
            small = low(pixels, self.size, mode=c.kernel, antialias=c.antialias)
        return self.network.features(normalise(small, c))  # type: ignore[operator]

    @property
    def side(self) -> int:
        """Of what the network gets, in px."""
        return self.data.hr if self.enlarged else self.size

    @property
    def stored(self) -> int:
        """Parameters stored for it: of a branch what is its own."""
        if isinstance(self.network, Branch):
            return self.network.stored_parameters
        return count_parameters(self.network)

    @functools.cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return macs(self.network, self.side)


def readers(
    folder: Path, config: Config, place: Callable, *, best: bool = False
) -> dict[str, dict[int, Reader]]:
    """Every row of a run's table, by resolution; place: to the device. A network that several rows
    use is the same object in each. best: of the best development epoch; phi_hr has none, and
    branches belong to the trunk of the last one."""
    c, s = config.data, config.resolutions[-1]

    @functools.cache
    def backbone(name: str, best: bool) -> nn.Module:
        return place(finished(folder, config, name, best=best)).eval()

    def enlarged(row: str, size: int, best: bool) -> Reader:
        return Reader(backbone(row, best and row != "hr"), c, size, enlarged=True)

    found: dict[str, dict[int, Reader]] = {}
    for row in config.students:
        if row == "hr" or row in TRUNKS:
            found[row] = {r: enlarged(row, r, best) for r in config.resolutions}
            continue
        smaller = config.resolutions[:-1]
        found[row] = {
            r: Reader(backbone(f"{row}-{r}", best), c, r, enlarged=False) for r in smaller
        }
        found[row][s] = enlarged("hr" if row == "mm" else config.trunk, s, False)
    return found


def finished(folder: Path, config: Config, name: str, *, best: bool = False) -> nn.Module:
    """The backbone that a run kept under an arm's name, or "hr"."""
    path = _student_file(folder, name, best=best)
    if name == "hr" or name in TRUNKS:
        network = config.teacher if name == "hr" else config.student
        recogniser = Recogniser(network, config.data.hr, int(read_metadata(path)["classes"]))
        restore(recogniser, path)
        return recogniser.backbone
    arm = arms(config)[name]
    if arm.from_trunk:
        base = trunk_of(folder, config).backbone
    else:
        base = Recogniser(config.student, config.data.hr, 1).backbone
    branch = branch_of(base, arm, config)
    restore(branch, path)
    return branch


def assembled(folder: Path, config: Config, row: str, *, best: bool = False) -> BTNet:
    """A run's trunk and the branches of `row`, behind the router; row a trunk: it alone."""
    c = config.data
    name = row if row in TRUNKS else config.trunk
    trunk = finished(folder, config, name, best=best and row in TRUNKS)
    chosen = config.resolutions[-1:] if row in TRUNKS else config.resolutions
    model = BTNet(
        chosen, trunk, indicator=config.indicator, rounding=config.rounding, kernel=c.kernel,
        antialias=c.antialias, mean=c.mean, std=c.std, bn=config.bn,
    )  # fmt: skip
    for r in chosen[:-1]:
        path = _student_file(folder, f"{row}-{r}", best=best)
        branch = branch_of(trunk, arms(config)[f"{row}-{r}"], config)
        restore(branch, path)
        model.branches[str(r)] = branch
    return model.eval()


def export(folder: Path, config: Config) -> None:
    """What goes on a camera: student.safetensors, the trunk, and branches/R.safetensors, a delta
    each that names the trunk it belongs to (BTNet.load_branch)."""
    row = next(row for row in reversed(BRANCHES) if row in config.students)
    model = assembled(folder, config, row)
    made_for = {
        "network": config.student.name, "size": str(model.resolutions[-1]),
        "resolutions": " ".join(map(str, model.resolutions)), "mean": str(model.data.mean),
        "std": str(model.data.std), "kernel": model.data.kernel, "indicator": model.indicator,
        "rounding": model.rounding,
    }  # fmt: skip
    save_safetensors(model.trunk, folder / "student.safetensors", made_for)
    (folder / "branches").mkdir(exist_ok=True)
    for r in model.resolutions[:-1]:
        model.save_branch(r, folder / "branches" / f"{r}.safetensors")


def _student_file(folder: Path, name: str, *, best: bool = False) -> Path:
    path = folder / "students" / f"{name}{'-best' if best else ''}.safetensors"
    if not path.is_file():
        there = sorted(p.stem for p in (folder / "students").glob("*.safetensors"))
        raise ValueError(
            f"{folder}: no network {path.stem!r} (there are: {', '.join(there) or 'none'})"
        )
    return path


def _named(folder: str) -> Path:
    path = Path(folder).expanduser()
    return path if path.is_dir() else locate(folder)
