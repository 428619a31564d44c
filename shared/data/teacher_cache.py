"""A frozen teacher's outputs for every training view, computed once and kept on disk.

Views are a finite set (shared.data.pipeline.Views), so a run of many epochs asks the teacher the
same questions again and again, and at 112 -> 16 px the teacher is most of the work. Kept outputs
are those of a live forward pass bit for bit: they are computed in batches of the run's own size per
rank, at its precision, with its threads, on its device. What a row is then does not depend on the
other images of the batch or on its place in it (shown by tests, and by benchmarks for iresnet50 at
112 px, batch 96, fp32 and bf16, 1 and 2 threads: no bit differs; a batch of another size does
differ, and has files of its own).

Below CACHE/outputs/<teacher>-<key>/:
    embeddings  [views, N, D], of the type the network puts out: bf16 takes half the bytes
    logits      [views, N, classes] float32, where they fit too, of the same pass; else the head
                makes them of the kept embeddings at each step, as it does live: the same bits.
                A teacher without classes has none
and below CACHE/outputs/<data>-<key>/, for images that are decoded from files (a step then decodes
no image at all), and for those in memory whose LR views are held there too (a run then makes none):
    lr          [views, N, 3 * lr * lr] uint8
The keys are made of all that decides the values. How files are checked: shared.data.kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shared.config import SCHEMA, Teacher, digest, locate
from shared.data.kept import Rows, fill
from shared.data.pipeline import Batch, Images, Loader, Part, Resident, Streaming, normalise
from shared.files import write_text
from shared.run import Run, provenance

if TYPE_CHECKING:
    from shared.teacher import FrozenTeacher

LR_PART = 256  # images
# Fields of Data that decide no training image, nothing of a teacher's input, nothing of an LR view.
_NEVER = ("test", "test_sets", "resident_gib", "workers")
_NOT_HR = ("lr", "kernel", "antialias", "quality", "degradation", *_NEVER)
_NOT_LR = ("mean", "std", "quality", *_NEVER)


class TeacherCache:
    """What `network` says about the views of a loader's images.

    fingerprint: the data set's, which changes when its files do.
    """

    def __init__(
        self, run: Run, teacher: Teacher, network: FrozenTeacher, loader: Loader, fingerprint: str
    ) -> None:
        self.run, self.teacher, self.network, self.loader = run, teacher, network, loader
        self.ready = False  # every view is there, and was checked
        batch, hr = loader.size // loader.world, loader.data.hr
        with run.autocast(), torch.no_grad():
            dtype = network.recogniser(torch.zeros(2, 3, hr, hr, device=run.device)).dtype
        machine = _machine(run.device)
        made_by = {
            "network": [teacher.name, teacher.input, teacher.head, teacher.scale, network.classes],
            "weights": _sha256(network.state_dict().values()),
            "images": _images(loader, loader.images, fingerprint, _NOT_HR),
            "computed": [run.precision, batch, torch.get_num_threads(), *machine],
        }
        self.folder = _folder(run, teacher.name, made_by)
        views, count = loader.views.count, len(loader.images)
        self.e = Rows(self.folder / "embeddings", views, count, network.dim, dtype, batch)
        self.z = Rows(self.folder / "logits", views, count, network.classes, torch.float32, batch)
        self.kept = [self.e]  # and self.z where it fits
        self.low: Rows | None = None
        fixed = loader.data.degradation == "plain" and loader.views.finite
        seen = loader.seen.images if isinstance(loader.seen, Part) else loader.seen
        readable = isinstance(seen, Streaming) and seen.on_error == "stop"
        if fixed and (readable or loader.tabled):
            made_by = {"images": _images(loader, loader.seen, fingerprint, _NOT_LR),
                       "computed": machine}  # fmt: skip
            folder, width = _folder(run, loader.data.name, made_by), 3 * loader.data.lr**2
            self.low = Rows(folder / "lr", views, count, width, torch.uint8, LR_PART)

    def keep(self, passes: int) -> None:
        """Compute all views, or take them from disk, if that is wanted and pays (Teacher.outputs).

        passes: how often the run would ask about every image, epochs x students taught.
        Raises ValueError where they are to be kept always, and take more than Teacher.outputs_gib.
        """
        run, loader = self.run, self.loader
        kept, why = run.broadcast(self._choose(passes))
        if kept is None:
            if why and self.teacher.outputs == "always":
                raise ValueError(f"--teacher.outputs always: {why}")
            if why:
                run.say(f"teacher's outputs are computed at each step: {why}")
            run.note(teacher_outputs="live")
            return
        views = range(loader.views.count)
        if "logits" in kept:
            self.kept = [self.e, self.z]
        fill(run, loader.images, self.kept, views, self._make, "teacher's outputs")
        self.ready = True
        if self.low is not None and "lr" in kept:
            fill(run, loader.seen, [self.low], views, self._make_low, "LR views")
            loader.kept_low = self.low
        logits = "kept" if "logits" in kept else "by the head, of the kept embeddings"
        if not self.network.classes:
            logits = "none"
        run.note(teacher_outputs=dict(folder=str(self.folder), views=len(views), logits=logits))

    def _choose(self, passes: int) -> tuple[list[str] | None, str]:
        """(what to keep beside the embeddings, ""), or (None, what stands against keeping them)."""
        c, views = self.teacher, self.loader.views.count
        if c.outputs == "never" or not passes:
            return None, ""
        if not self.loader.views.finite:
            return None, "--data.crop resized draws other views in every epoch"
        if c.outputs == "auto" and passes < views and not self.e.whole():
            return None, ""
        limit = int(c.outputs_gib * 2**30)
        there = sum(rows.held() for rows in (self.e, self.z, self.low) if rows is not None)
        free = shutil.disk_usage(self.folder).free + there
        room = min(limit, free) - self.e.nbytes
        if room < 0:
            size = f"{views} views of {self.e.count:,} images take {self.e.nbytes / 2**30:,.2f} GiB"
            if limit <= free:
                return None, f"{size}, --teacher.outputs-gib allows {c.outputs_gib:g}"
            return None, f"{size}, {self.folder} has room for {free / 2**30:,.2f}"
        kept = []
        if self.low is not None and self.low.nbytes <= room:
            kept.append("lr")
            room -= self.low.nbytes
        if 0 < self.z.nbytes <= room and (self.z.whole() or not self.e.whole()):
            kept.append("logits")
        return kept, ""

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(e_t [B, D], z_t [B, classes]) float32 on the run's device, of a batch's views."""
        e_t = self.e.read(batch.view, batch.index).to(self.run.device).float()
        if self.z in self.kept:
            return e_t, self.z.read(batch.view, batch.index).to(self.run.device)
        return e_t, self.network.logits(e_t)

    def embeddings(self) -> np.ndarray:
        """[N, D] float32, read-only, of the images as they are, by number; one pass if need be."""
        identity = self.loader.views.identity
        if not self.ready:
            fill(self.run, self.loader.images, self.kept, [identity], self._make, "embeddings")
        return self.e.float32(identity)

    def _make(self, pixels: Tensor, view: int) -> list[Tensor]:
        chosen = torch.full((len(pixels),), view)
        moved = self.loader.views.apply(pixels.to(self.run.device), chosen)
        with self.run.autocast():
            made = self.network(normalise(moved, self.loader.data))
        return list(made[: len(self.kept)])

    def _make_low(self, pixels: Tensor, view: int) -> list[Tensor]:
        return [self.loader.low_view(pixels.to(self.run.device), view).flatten(1)]


def _images(loader: Loader, images: Images, fingerprint: str, without: Iterable[str]) -> list[Any]:
    """What decides the views of images: settings, labels in their order, and content."""
    settings = dataclasses.asdict(loader.data)
    kept = {k: settings[k] for k in settings.keys() - set(without)}
    kept["box"] = loader.data.quality == "unlocalised"  # what the teacher sees of a picture
    return [kept, fingerprint, _sha256(_content(images))]


def _content(images: Images) -> list[Tensor]:
    if isinstance(images, Part):
        return [images.numbers, *_content(images.images)]
    return [images.labels, images.pixels] if isinstance(images, Resident) else [images.labels]


def _sha256(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _machine(device: torch.device) -> list[str]:
    """What else may change a bit: library, processor, instructions."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [torch.__version__, provenance()["machine"], device.type, gpu]
    limits = [os.environ.get("ONEDNN_MAX_CPU_ISA", ""), torch.backends.cpu.get_cpu_capability()]
    return [str(fact) for fact in known + limits]


def _folder(run: Run, name: str, made_by: dict[str, Any]) -> Path:
    """Named by all that decides the values, which about.json tells a reader."""
    folder = locate(run.config.cache) / "outputs" / f"{name}-{digest(SCHEMA, made_by)}"
    folder.mkdir(parents=True, exist_ok=True)
    if run.rank == 0:
        write_text(folder / "about.json", json.dumps(made_by, indent=1))
    return folder
