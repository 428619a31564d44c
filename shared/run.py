"""One training run: device, precision, ranks, seed, run folder, progress, metrics, checkpoints.

    run = Run.start("crrcd", config)                       # new folder, or config.resume
    phase = run.phase("crrcd", modules, optimiser, loader, config.optim)
    for batch in phase:                                    # goes on where last.ckpt stopped
        ...loss.backward(); optimiser.step()...
        phase.log(batch, loss=loss, cls=cls)               # stops at a value that is not finite
        if phase.due(batch):
            phase.keep_best(score, student)

Everything that decides a step is a function of (seed, epoch, step) or lies in the checkpoint, so
that a run killed at any moment and resumed gives the bits of one that was not (on CPU, with the
same threads).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from shared import optim as schedules
from shared.config import ROOT, SCHEMA, Optim, locate, to_dict
from shared.config import Run as RunConfig
from shared.data.pipeline import Batch, Loader
from shared.models.recogniser import Recogniser, save


M = TypeVar("M", bound=nn.Module)


class NotFinite(ValueError):
    """A loss or gradient that is NaN or infinite; the last good checkpoint stands."""


class Run:
    """A run's folder, machine and ranks. Make one with `Run.start`."""

    def __init__(self, paper: str, config: RunConfig) -> None:
        self.paper, self.config = paper, config
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = _device(config.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if config.threads:
            torch.set_num_threads(config.threads)
        self.precision: str = config.precision
        self.folder = Path(config.resume) if config.resume else self._new_folder()
        self._facts: dict[str, Any] = {}
        self._bar_shown = sys.stderr.isatty() and self.rank == 0

    @classmethod
    def start(cls, paper: str, config: RunConfig) -> Run:
        """A new run folder with its config.json, or the folder that `config.resume` names.

        Raises ValueError when the run to resume was made with another number of threads or ranks.
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
        else:
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
        self.place(model)
        x = torch.zeros(max(2, batch // self.world), 3, size, size, device=self.device)
        x = x.to(memory_format=torch.channels_last)
        times: dict[str, float] = {}
        for precision in ("fp32", "bf16"):
            self.precision = precision
            for step in range(4):  # the first one warms up
                began = time.perf_counter()
                with self.autocast():
                    out = model(x)
                out.float().square().mean().backward()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                took = time.perf_counter() - began
                if step:
                    times[precision] = min(took, times.get(precision, took))
        self.precision = self.broadcast(min(times, key=lambda p: times[p]))
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
            if self.device.type == "cuda":
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        return model

    def place(self, model: M) -> M:
        """To the device, in the run's memory format."""
        if self.config.channels_last:
            return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(self.device)

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
        """[B, ...] of every rank, in rank order: [world * B, ...]. No gradient."""
        if self.world == 1:
            return local
        parts = [torch.empty_like(local) for _ in range(self.world)]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor whose rows are the global batch."""
        size = len(whole) // self.world
        return whole[self.rank * size : (self.rank + 1) * size]

    def mean_gradients(self, *modules: nn.Module) -> None:
        """Average gradients over ranks for small modules that `wrap` did not wrap."""
        if self.world == 1:
            return
        grads = [p.grad for m in modules for p in m.parameters() if p.grad is not None]
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

    def _new_folder(self) -> Path:
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

    def note(self, **facts: Any) -> None:
        """Keep facts about this run (licences, say) in its config.json."""
        self._facts.update(facts)
        if self.rank:
            return
        import torchvision

        record = {
            "schema": SCHEMA,
            "paper": self.paper,
            "config": to_dict(self.config) | {"resume": ""},
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "ranks": self.world,
            "device": str(self.device),
            "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, "
            f"{_processor()}",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
            "git": _git_hash(),
            **self._facts,
        }
        write_text(self.folder / "config.json", json.dumps(record, indent=1))


class Phase:
    """The training of one set of modules: iterate over it for batches (see the module's text)."""

    def __init__(
        self,
        run: Run,
        name: str,
        modules: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        loader: Loader,
        optim: Optim,
        folder: Path,
    ) -> None:
        self.run, self.name, self.modules, self.optimiser = run, name, modules, optimiser
        self.loader, self.optim, self.folder = loader, optim, folder
        self.steps = loader.steps * optim.epochs
        self.step = 0  # steps done
        self.best: dict[str, Any] = {"score": -float("inf"), "epoch": 0, "state": {}}
        self._pending: list[tuple[int, Tensor, dict[str, Tensor]]] = []
        self._latest: dict[str, float] = {}
        self._signal = 0
        self._metrics = folder / "metrics.jsonl"
        self._restore()

    def __iter__(self) -> Iterator[Batch]:
        began, from_step = time.perf_counter(), self.step
        self._saved = time.perf_counter()
        bar = self._bar()
        with self._signals():
            while self.step < self.steps:
                epoch, start = divmod(self.step, self.loader.steps)
                for batch in self.loader.epoch(epoch, start):
                    schedules.set_rate(
                        self.optimiser,
                        schedules.rate(self.optim, self.step, self.steps, self.loader.steps),
                    )
                    yield batch
                    self.step += 1
                    self._progress(bar, began, from_step)
                    if self._stop_asked():
                        self.save()
                        self._leave()
                    if time.perf_counter() - self._saved > self.run.config.checkpoint_seconds:
                        self.save()
        bar.close()
        self._flush()

    def log(self, batch: Batch, **terms: Tensor) -> dict[str, float] | None:
        """Note the terms of a step (scalars); every `log_every`th goes to metrics.jsonl.

        Returns their values at such a step, None at others. Raises NotFinite with the step, the term and the batch's indices. On CUDA the check comes
        at the next logged step or checkpoint, so that no step waits for the device.
        """
        detached = {name: value.detach() for name, value in terms.items()}
        self._pending.append((self.step, batch.index, detached))
        logged = self.step % self.run.config.log_every == 0
        if logged or self.run.device.type == "cpu":
            self._flush()
        if logged:
            values = torch.stack([v.float().reshape(()) for v in detached.values()])
            if self.run.world > 1:
                dist.all_reduce(values)
                values /= self.run.world
            self._latest = dict(zip(detached, values.tolist(), strict=True))
            self._write(
                epoch=self.step // self.loader.steps,
                lr=self.optimiser.param_groups[0]["lr"],
                **self._latest,
            )
        return self._latest if logged else None

    def due(self, batch: Batch) -> bool:
        """Whether the development split is scored after this batch."""
        epoch = batch.epoch + 1
        return batch.last and (
            epoch % self.run.config.evaluate_every == 0 or epoch == self.optim.epochs
        )

    def keep_best(self, model: nn.Module, headline: str, metrics: Mapping[str, float]) -> None:
        """Log a development score; keep the model's weights if metrics[headline] is the best."""
        epoch = self.step // self.loader.steps + 1
        self._write(epoch=epoch, development=metrics[headline], **metrics)
        if metrics[headline] > self.best["score"]:
            state = {k: v.detach().clone() for k, v in model.state_dict().items()}
            self.best = {"score": metrics[headline], "epoch": epoch, "state": state}

    def finish(self, student: Recogniser, **metadata: object) -> None:
        """Write the student of the last epoch and of the best one: students/<phase>.safetensors.

        The paper's own also become student.safetensors and best.ckpt of the run folder. A finished
        student is not trained again by --resume.
        """
        self.save()
        if self.run.rank == 0:
            folder = self.folder / "students"
            folder.mkdir(exist_ok=True)
            facts = {k: str(v) for k, v in metadata.items()}
            last = {k: v.detach().clone() for k, v in student.state_dict().items()}
            own = self.name == self.run.paper
            if self.best["state"]:
                facts_best = facts | {"epoch": str(self.best["epoch"])}
                student.load_state_dict(self.best["state"])
                save(student, folder / f"{self.name}-best.safetensors", **facts_best)
                if own:
                    best = {"schema": SCHEMA, "phase": self.name} | self.best
                    write_checkpoint(self.folder / "best.ckpt", best)
                student.load_state_dict(last)
            facts |= {"epoch": str(self.optim.epochs)}
            if own:
                save(student, self.folder / "student.safetensors", **facts)
            save(student, folder / f"{self.name}.safetensors", **facts)
        self.run.broadcast(None)  # the other ranks wait

    def save(self) -> None:
        """Write last.ckpt (rank 0): a temporary file, then a rename."""
        self._flush()
        self._saved = time.perf_counter()
        if self.run.rank:
            return
        state = {
            "schema": SCHEMA,
            "phase": self.name,
            "step": self.step,
            "modules": {name: m.state_dict() for name, m in self.modules.items()},
            "optimiser": self.optimiser.state_dict(),
            "best": self.best,
            "metrics_bytes": self._metrics.stat().st_size if self._metrics.exists() else 0,
            "rng": torch.get_rng_state(),
        }
        write_checkpoint(self.folder / "last.ckpt", state)

    # -- inside ----------------------------------------------------------------------------------

    def _restore(self) -> None:
        path = self.folder / "last.ckpt"
        if not path.is_file():
            self._truncate(None)
            return
        state = read_checkpoint(path)
        if state["phase"] != self.name:  # of an earlier phase: this one starts
            self._truncate(None)
            return
        for name, module in self.modules.items():
            try:
                module.load_state_dict(state["modules"][name])
            except (RuntimeError, KeyError) as error:
                line = str(error).split("\n")[1 if "\n" in str(error) else 0].strip()
                raise ValueError(
                    f"{path}: a checkpoint of another architecture ({name}: {line[:200]})"
                ) from None
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.best = state["step"], state["best"]
        torch.set_rng_state(state["rng"])
        self._truncate(state["metrics_bytes"])
        self.run.say(f"{self.name}: going on from step {self.step} of {self.steps}")

    def _truncate(self, size: int | None) -> None:
        """Drop the lines written after the checkpoint: they will be written again."""
        if self.run.rank or not self._metrics.exists():
            return
        if size is None:  # no checkpoint at all: this phase's lines, if any, are stale
            lines = self._metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if f'"phase": "{self.name}"' not in line]
            self._metrics.write_text("".join(kept))
        else:
            os.truncate(self._metrics, size)

    def _write(self, **values: float) -> None:
        if self.run.rank == 0:
            line = {"phase": self.name, "step": self.step, **values}
            with open(self._metrics, "a") as file:
                file.write(json.dumps(line) + "\n")

    def _flush(self) -> None:
        for step, index, terms in self._pending:
            bad = [name for name, value in terms.items() if not torch.isfinite(value).all()]
            if bad:
                last = self.folder / "last.ckpt"
                stands = f"{last} stands" if last.exists() else "no checkpoint was written yet"
                raise NotFinite(
                    f"{self.name}: {bad[0]} is not finite at step {step} "
                    f"(not finite: {', '.join(bad)}; batch indices {index.tolist()}); {stands}; "
                    "try a lower --optim.lr or --optim.clip 1"
                )
        self._pending.clear()

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.steps,
            initial=self.step,
            desc=self.name,
            unit="step",
            disable=not self.run._bar_shown,
            leave=False,
            file=sys.stderr,
        )

    def _progress(self, bar: tqdm, began: float, from_step: int) -> None:
        spent = time.perf_counter() - began
        speed = (self.step - from_step) * self.optim.batch / spent
        loss = self._latest.get("loss", float("nan"))
        if not bar.disable:
            epoch = (self.step - 1) // self.loader.steps + 1
            bar.set_postfix_str(
                f"epoch {epoch}/{self.optim.epochs}, loss {loss:.3f}, {speed:,.0f} img/s",
                refresh=False,
            )
            bar.update()
        elif time.perf_counter() - getattr(self, "_said", began) > 10 or self.step == self.steps:
            self._said = time.perf_counter()
            left = timedelta(seconds=round((self.steps - self.step) * self.optim.batch / speed))
            self.run.say(
                f"{self.name}: step {self.step}/{self.steps}, loss {loss:.3f}, "
                f"{speed:,.0f} img/s, {left} left"
            )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C only raise a flag here: the step is finished and saved first."""

        def note(number: int, frame: Any) -> None:
            self._signal = number

        before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not the main thread: leave signals alone
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_asked(self) -> bool:
        if self.run.world == 1:
            return bool(self._signal)
        if self.step % self.run.config.log_every:
            return False  # the ranks agree on it only now and then: it makes them wait
        flag = torch.tensor(self._signal, device=self.run.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self._signal = int(flag)
        return bool(self._signal)

    def _leave(self) -> None:
        self.run.say(
            f"stopped at step {self.step} of {self.name}, saved; go on with: "
            f"python train.py --resume {self.run.folder}"
        )
        raise SystemExit(128 + self._signal)


# -- files ---------------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> None:
    """Write whole or not at all: a temporary file beside `path`, then a rename.

    Raises OSError naming the path when the disk is full; what stood at `path` still stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        stands = "; the last good one stands" if path.exists() else ""
        raise OSError(f"{path}: cannot be written ({error.strerror}){stands}") from None


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # torch.save to a full disk raises no OSError; a plain write does
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A last.ckpt. Raises ValueError when it is damaged or of another schema."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        line = str(error).split("\n")[0][:120]
        raise ValueError(f"{path}: not a readable checkpoint ({line})") from None
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        found = state.get("schema") if isinstance(state, dict) else None
        raise ValueError(f"{path}: checkpoint of schema {found}, this code reads {SCHEMA}")
    return state


def _device(name: str) -> torch.device:
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


