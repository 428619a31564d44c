"""The training of one network inside a run: batches in, checkpoints and metrics out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from shared import optim as schedules
from shared.config import SCHEMA, Optim
from shared.data.pipeline import Batch, Loader
from shared.files import read_checkpoint, write_checkpoint, write_text
from shared.models.recogniser import save

if TYPE_CHECKING:
    from shared.run import Run


class NotFinite(ValueError):
    """A loss or gradient that is NaN or infinite; the last good checkpoint stands."""


class Phase:
    """The training of one set of modules: iterate over it for batches (see shared.run)."""

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
        self._events = self._open_events()

    def __iter__(self) -> Iterator[Batch]:
        began, from_step = time.perf_counter(), self.step
        self._saved = waited = time.perf_counter()
        took: list[float] = []  # seconds of each step: its batch brought, its work handed out
        bar = self._bar()
        with self._signals():
            while self.step < self.steps:
                epoch, start = divmod(self.step, self.loader.steps)
                for batch in self.loader.epoch(epoch, start):
                    schedules.set_rate(
                        self.optimiser,
                        schedules.rate(self.optim, self.step, self.steps, self.loader.steps),
                    )
                    # what is random inside a network (dropout): by step and rank, so resumable
                    own = self.run.generator(self.step, self.run.rank, 1)
                    torch.manual_seed(own.initial_seed())
                    yield batch
                    took.append(time.perf_counter() - waited)
                    self.step += 1
                    self._progress(bar, began, from_step)
                    if self._stop_asked():
                        self.save()
                        self._leave()
                    if time.perf_counter() - self._saved > self.run.config.checkpoint_seconds:
                        self.save()
                    waited = time.perf_counter()
        bar.close()
        self._flush()
        self.run.note_steps(self.name, self.steps, statistics.median(took) if took else None)
        if self._events:
            self._events.close()

    def log(self, batch: Batch, **terms: Tensor) -> dict[str, float] | None:
        """Note the terms of a step (scalars); every `log_every`th goes to metrics.jsonl.

        Returns their values at such a step, None at others. Raises NotFinite with the step, the
        term and the batch's indices. On CUDA the check comes at the next logged step or
        checkpoint, so that no step waits for the device.
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

    def finish(self, student: nn.Module, *, own: bool | None = None, **metadata: object) -> None:
        """Write the student of the last epoch and of the best one: students/<phase>.safetensors.

        The paper's own also become student.safetensors and best.ckpt of the run folder; own: None,
        the one called like the paper. A finished student is not trained again by --resume.
        """
        self.save()
        if self.run.rank == 0:
            folder = self.folder / "students"
            folder.mkdir(exist_ok=True)
            facts = {k: str(v) for k, v in metadata.items()}
            last = {k: v.detach().clone() for k, v in student.state_dict().items()}
            own = self.name == self.run.paper if own is None else own
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
        self._truncate(state["metrics_bytes"])
        self.run.say(f"{self.name}: going on from step {self.step} of {self.steps}")

    def _truncate(self, size: int | None) -> None:
        """Drop the lines written after the checkpoint: they will be written again."""
        if self.run.rank or not self._metrics.exists():
            return
        if size is None:  # no checkpoint at all: this phase's lines, if any, are stale
            lines = self._metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if f'"phase": "{self.name}"' not in line]
            write_text(self._metrics, "".join(kept))
        else:
            os.truncate(self._metrics, size)

    def _write(self, **values: float) -> None:
        if self.run.rank == 0:
            line = {"phase": self.name, "step": self.step, **values}
            with open(self._metrics, "a") as file:
                file.write(json.dumps(line) + "\n")
            if self._events:
                for name, value in values.items():
                    self._events.add_scalar(name, value, self.step)

    def _open_events(self) -> Any:
        """A TensorBoard writer for this phase, if one is asked for; steps to be done again go."""
        if not self.run.config.tensorboard or self.run.rank:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "--tensorboard needs the extra: python -m pip install -e .[tensorboard]"
            ) from None
        return SummaryWriter(str(self.folder / "events" / self.name), purge_step=self.step)

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

        before: dict[signal.Signals, Any] = {}
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
