"""One training run: device, precision, ranks, seed, run folder, progress, metrics, checkpoints.

    run = Run.start("crrcd", config)                       # new folder, or config.resume
    phase = run.phase("crrcd", modules, optimiser, loader, config.optim)
    for batch in phase:                                    # goes on where last.ckpt stopped
        ...loss.backward()
        phase.log(batch, loss=loss, cls=cls)               # stops at a value that is not finite
        optimiser.step()
        if phase.due(batch):
            phase.keep_best(student, "rank1", metrics)
    phase.finish(student)                                  # students/crrcd.safetensors

Everything that decides a step is a function of (seed, epoch, step) or lies in the checkpoint, so
that a run killed at any moment and resumed gives the bits of one that was not (on CPU, with the
same threads).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from shared.config import ROOT, SCHEMA, Optim, locate, to_dict
from shared.config import Run as RunConfig
from shared.data.pipeline import Loader
from shared.files import write_text
from shared.models.heads import AdaFace, CurricularFace
from shared.phase import Phase

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class Run:
    """A run's folder, machine and ranks. Make one with `Run.start`."""

    def __init__(self, paper: str, config: RunConfig) -> None:
        self.paper, self.config = paper, config
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = choose_device(config.device)
        if self.world > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=6))  # one may decode for all
        if config.threads:
            torch.set_num_threads(config.threads)
        self.precision: str = config.precision
        self.folder = Path(config.resume) if config.resume else self._new_folder()
        self._facts: dict[str, Any] = {}
        self._first: dict[str, Any] = {}  # of a resumed run: what its config.json said
        self._began = time.monotonic()
        self._bar_shown = sys.stderr.isatty() and self.rank == 0

    @classmethod
    def start(cls, paper: str, config: RunConfig) -> Run:
        """A new run folder with its config.json, or the folder that `config.resume` names.

        Says so when the run to resume began with other threads or ranks: it will not be bit-exact.
        Raises ValueError when it is another paper's.
        """
        run = cls(paper, config)
        if config.resume:
            record = json.loads((run.folder / "config.json").read_text())
            if record["paper"] != paper:
                raise ValueError(f"{run.folder}: a run of {record['paper']}, not of {paper}")
            if (record["threads"], record["ranks"]) != (torch.get_num_threads(), run.world):
                run.say(
                    f"note: this run began with {record['threads']} threads and {record['ranks']} "
                    f"ranks, and goes on with {torch.get_num_threads()} and {run.world}: "
                    "the rest will not be the same bits"
                )
            run.precision = record["precision"]
            run._first = record
        run.note()
        run.say(f"{paper} {config.recipe}: {run.folder}")
        return run

    # -- machine ---------------------------------------------------------------------------------

    def choose_precision(self, model: nn.Module, size: int, batch: int) -> None:
        """Settle `precision="auto"`: the faster of fp32 and bf16 over three timed steps each.

        model takes [batch, 3, size, size] and is thrown away. bf16 is 3 times faster where the
        processor multiplies it in hardware and 10 times slower where it does not, so it is
        measured; the choice is kept in config.json.
        """
        if self.precision != "auto":
            return
        precision, times = faster_precision(model, size, max(2, batch // self.world), self.device)
        self.precision = self.broadcast(precision)
        shown = ", ".join(f"{p} {1e3 * t:.1f} ms" for p, t in times.items())
        self.say(f"precision: {self.precision} (a step of the student: {shown})")
        self.note()

    def autocast(self) -> torch.autocast:
        """bf16 products where the run's precision says so; losses stay in float32."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in the loop: DistributedDataParallel, compiled, as configured.

        Call `place` first; keep the bare module for state dicts.
        """
        if self.config.compile:
            model = torch.compile(model)  # type: ignore[assignment]
        if self.world > 1:
            for module in model.modules():
                if isinstance(module, CurricularFace | AdaFace):  # statistics of the global batch
                    module.gather = self.gather
            if self.device.type == "cuda":
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        return model

    def place(self, model: M) -> M:
        """To the device, in channels-last: what convolutions are fastest in here and on GPUs."""
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def generator(self, *key: int) -> torch.Generator:
        """Random numbers that depend on (seed, *key) alone: the same on every rank, resumable."""
        mixed = 0x9E3779B97F4A7C15 * (self.config.seed + 1) & (2**64 - 1)
        for part in key:  # splitmix64, so that neighbouring keys share nothing
            mixed = (mixed + 0x9E3779B97F4A7C15 * (part + 1)) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
            mixed ^= mixed >> 31
        return torch.Generator(self.device).manual_seed(mixed >> 1)

    # -- ranks -----------------------------------------------------------------------------------

    def gather(self, local: Tensor) -> Tensor:
        """[B, ...] of every rank, in rank order: [world * B, ...]. No gradient.

        On the run's device, but for one rank: then `local` itself.
        """
        if self.world == 1:
            return local
        local = local.to(self.device)  # nccl takes no others
        parts = [torch.empty_like(local) for _ in range(self.world)]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    def gather_with_gradient(self, local: Tensor) -> Tensor:
        """`gather` whose result passes gradient to this rank's rows, times the number of ranks.

        For a loss over the global batch that every rank computes alike: the mean of gradients over
        ranks (`wrap`, `mean_gradients`) is then that of one rank with the whole batch.
        """
        return local if self.world == 1 else _Gather.apply(local, self)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor whose rows are the global batch."""
        size = len(whole) // self.world
        return whole[self.rank * size : (self.rank + 1) * size]

    def mean_gradients(self, *modules: nn.Module) -> None:
        """Average gradients over ranks for small modules that `wrap` did not wrap."""
        if self.world == 1:
            return
        grads = [p.grad for m in modules for p in m.parameters() if p.grad is not None]
        if not grads:
            return
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        flat /= self.world
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    # -- folder ----------------------------------------------------------------------------------

    def seconds(self) -> int | None:
        """Since the run began; None for a resumed one, whose earlier part was not timed."""
        return None if self.config.resume else round(time.monotonic() - self._began)

    def say(self, line: str) -> None:
        if self.rank == 0:
            tqdm.write(line, file=sys.stderr)

    def has_student(self, arm: str) -> bool:
        """Whether that student was finished before this run was interrupted."""
        return self.broadcast((self.folder / "students" / f"{arm}.safetensors").is_file())

    def phase(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        loader: Loader,
        optim: Optim,
        folder: Path | None = None,
    ) -> Phase:
        """One network's training inside this run; `folder` other than the run's for a teacher."""
        return Phase(self, name, modules, optimiser, loader, optim, folder or self.folder)

    def in_turn(self, load: Callable[[], T]) -> T:
        """What `load` returns; rank 0 goes first, so that only it downloads or renders."""
        found = load() if self.rank == 0 else None
        self.broadcast(None)
        return load() if found is None else found

    def _new_folder(self) -> Path:
        if self.config.folder:
            named = Path(self.config.folder).expanduser().resolve()
            if self.rank == 0 and (named / "config.json").exists():
                raise ValueError(f"--folder {named}: a run lies there; go on with --resume {named}")
            if self.rank == 0:
                named.mkdir(parents=True, exist_ok=True)
            return Path(self.broadcast(str(named)))
        stamp = time.strftime("%Y%m%d-%H%M%S")
        base = locate(self.config.runs) / self.paper / f"{self.config.recipe or 'run'}-{stamp}"
        folder, copy = base, 1
        while self.rank == 0:
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                copy += 1
                folder = base.with_name(f"{base.name}-{copy}")
        return Path(self.broadcast(str(folder)))

    def note_steps(self, phase: str, count: int, seconds: float | None) -> None:
        """Keep how many steps a phase has and the median of their wall times, of those done here;
        None where all were done before the run was interrupted.

        Scores and checkpoints are no part of it: the former are outliers, the latter not timed.
        """
        before = {**self._first.get("steps", {}), **self._facts.get("steps", {})}
        median = seconds and round(1e3 * seconds, 3)
        self.note(steps=before | {phase: {"count": count, "median_ms": median}})

    def note(self, **facts: Any) -> None:
        """Keep facts about this run (licences, say) in its config.json."""
        self._facts.update(facts)
        if self.rank:
            return
        record = {
            "schema": SCHEMA,
            "paper": self.paper,
            "config": to_dict(self.config) | {"resume": ""},
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "ranks": self.world,
            "device": str(self.device),
            **provenance(),
            **self._facts,
        }
        if self._first:  # the first record stands; who went on with the run is added
            here = {k: record[k] for k in ("threads", "ranks", "device", "machine", "git")}
            went_on = [*self._first.get("resumed", []), here]
            # the precision too is the first one's, or was settled only now
            record = {**self._first, "precision": self.precision, **self._facts}
            record["resumed"] = went_on
        write_text(self.folder / "config.json", json.dumps(record, indent=1))


class _Gather(torch.autograd.Function):
    """Every rank's rows; backward keeps this rank's, and communicates nothing."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, run: Run) -> Tensor:
        ctx.run = run
        return run.gather(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.run.own(grad) * ctx.run.world, None


def faster_precision(
    model: nn.Module, size: int, batch: int, device: torch.device
) -> tuple[str, dict[str, float]]:
    """(the faster of "fp32" and "bf16", seconds of a step by precision: the least of three).

    model takes [batch, 3, size, size]; it is moved to the device and has gradients afterwards.
    """
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.zeros(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    times: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        for step in range(4):  # the first one warms up
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                out = model(x)
            out.float().square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - began
            if step:
                times[precision] = min(took, times.get(precision, took))
    return min(times, key=lambda p: times[p]), times


def choose_device(name: str) -> torch.device:
    """The device called `name`; auto: cuda where there is one. Raises ValueError if it is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device (auto, cpu, cuda, cuda:1)") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: PyTorch sees no CUDA device here")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


def provenance() -> dict[str, Any]:
    """Where a number was measured: machine, versions, git."""
    return {
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, "
        f"{_processor()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": metadata.version("torchvision"),  # importing it takes seconds
        },
        "git": _git_hash(),
    }


def _git_hash() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or "unknown processor"
