"""The high-resolution teacher: trained once, cached by the hash of everything that made it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from shared import optim
from shared.config import SCHEMA, Data, Teacher, digest, locate
from shared.data import objects, procedural
from shared.data.kept import locked
from shared.data.pipeline import Batch, Loader, Part
from shared.data.protocols import Task
from shared.data.samplers import PKSampler
from shared.data.sets import DataSet
from shared.data.teacher_cache import TeacherCache
from shared.losses import triplet
from shared.models import checkpoints
from shared.models.recogniser import Recogniser, class_means, load_weights, restore, save
from shared.run import Run

# Fields of Data, and of Teacher, that no teacher depends on.
_STUDENT_ONLY = (
    "lr", "kernel", "antialias", "quality", "degradation", "development", "test", "on_error",
    "resident_gib", "workers", "identities", "classes", "root", "counts", "test_sets", "landmarks",
    "any_alignment",
)  # fmt: skip
_OF_OUTPUTS = ("outputs", "outputs_gib")


class FrozenTeacher(nn.Module):
    """x_h [B, 3, hr, hr] -> (e_t [B, D], z_t [B, classes]): no gradient, batch norm frozen.

    The teacher may know more identities than the student is taught; z_t holds the student's. A
    teacher without classes (head "none") has classes 0: z_t is [B, 0].
    """

    def __init__(self, recogniser: Recogniser, classes: int) -> None:
        super().__init__()
        self.recogniser = recogniser.eval().requires_grad_(False)
        self.classes = classes if recogniser.classified else 0
        self.cache: TeacherCache | None = None

    @property
    def dim(self) -> int:
        return self.recogniser.dim

    @torch.no_grad()
    def forward(self, x_h: Tensor) -> tuple[Tensor, Tensor]:
        e_t = self.recogniser(x_h)
        return e_t.float(), self.logits(e_t)

    @torch.no_grad()
    def logits(self, e_t: Tensor) -> Tensor:
        """[B, D] -> [B, classes]."""
        return self.recogniser.logits(e_t)[:, : self.classes]

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(e_t [B, D], z_t [B, classes]) of a batch's HR views, float32.

        Kept ones where `get` keeps them, else live: the same bits at the batch size that they were
        computed in (shared.data.teacher_cache). To be called under the run's autocast.
        """
        if self.cache is not None and self.cache.ready:
            return self.cache.rows(batch)
        return self(batch.x_h())

    @torch.no_grad()
    def maps(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(e_t [B, D] float32, feature maps by name [B, C, h, w]) of a batch's HR views.

        Always by a forward pass: maps are too large to keep. To be called under the run's autocast.
        """
        e_t, maps = self.recogniser(batch.x_h(), maps=True)
        return e_t.float(), maps

    def embeddings(self) -> np.ndarray:
        """e_t of all training images without augmentation, [N, D] float32 by number, read-only.

        From the cache, or by one pass that is then kept there. Every rank has to call it. An image
        that could not be decoded, and was not to stop the run, has zeros.
        """
        if self.cache is None:
            raise ValueError("this teacher was given no loader: teacher.get(..., loader=loader)")
        return self.cache.embeddings()

    @torch.no_grad()
    def output(self, x_h: Tensor, task: Task) -> Tensor:
        """What the teacher is scored by: its embedding (faces) or its logits (objects)."""
        e_t, z_t = self(x_h)
        return e_t if task == "faces" else z_t


def get(
    run: Run,
    teacher: Teacher,
    data: Data,
    dataset: DataSet,
    *,
    loader: Loader | None = None,
    passes: int = 0,
) -> FrozenTeacher:
    """The teacher that the configuration names, from the cache, a checkpoint or a training run.

    loader: of the images that it will teach on. passes: how often it will be asked about them,
    epochs x students taught (0: its outputs are not kept; else see Teacher.outputs). Interrupted
    training goes on where it stopped; a second process that wants the same teacher waits for the
    first. Raises ValueError for a checkpoint that does not fit, and for outputs that are to be kept
    always and take more than Teacher.outputs_gib.
    """
    if teacher.head == "none" and dataset.task == "objects":
        raise ValueError(
            f"--teacher.head none: {data.name} is scored by classes, which such a teacher has not"
        )
    recogniser = _recogniser(run, teacher, data, dataset)
    return of(run, recogniser, teacher, dataset, loader=loader, passes=passes)


def of(
    run: Run,
    recogniser: Recogniser,
    made_by: Teacher,
    dataset: DataSet,
    *,
    loader: Loader | None = None,
    passes: int = 0,
) -> FrozenTeacher:
    """Any trained network as a teacher, frozen in place, with kept outputs of its own.

    made_by: its name, input, head and scale, and how its outputs are kept. loader, passes: see
    `get`.
    """
    frozen = FrozenTeacher(recogniser, dataset.classes)
    if loader is not None:
        frozen.cache = TeacherCache(run, made_by, frozen, loader, dataset.fingerprint)
        frozen.cache.keep(passes)
    return frozen


def _recogniser(run: Run, teacher: Teacher, data: Data, dataset: DataSet) -> Recogniser:
    if teacher.checkpoint and teacher.weights:
        raise ValueError(
            "--teacher.checkpoint and --teacher.weights: the first is a finished teacher, the "
            "second is where one starts; take one of the two"
        )
    torch.manual_seed(run.config.seed)
    recogniser = Recogniser(teacher, data.hr, dataset.teacher_classes)
    run.place(recogniser)
    if teacher.checkpoint:
        _load_own(run, recogniser, teacher, data, dataset)
        return recogniser
    folder = _folder(run, teacher, data, dataset, _hash_of(teacher.weights))
    path = folder / "teacher.safetensors"
    with locked(folder, run.say) if run.rank == 0 else contextlib.nullcontext():
        trained = run.broadcast(path.is_file())
        if not trained:
            if teacher.weights:
                line = run.in_turn(lambda: load_weights(recogniser, teacher, "--teacher"))
                run.say(f"teacher: {teacher.name} {line}")
            _train(run, recogniser, teacher, data, dataset, folder)
            if run.rank == 0:
                save(recogniser, path, teacher=teacher.name, seed=str(run.config.seed))
    run.broadcast(None)  # nobody reads before it is written
    restore(recogniser, path)
    run.say(f"teacher: {teacher.name} {'from' if trained else 'trained, kept in'} {folder}")
    return recogniser


def _train(
    run: Run, recogniser: Recogniser, teacher: Teacher, data: Data, dataset: DataSet, folder: Path
) -> None:
    """Cross-entropy on the head's logits, or batch-hard triplets of unit embeddings without a head;
    and nothing else."""
    c, seed, sampler = teacher.optim, run.config.seed, None
    if not recogniser.classified:
        k = teacher.images_per_class
        if k < 2 or c.batch % k:
            raise ValueError(
                f"--teacher.images-per-class {k}: must be 2 or more and divide --teacher.optim."
                f"batch {c.batch}"
            )
        sampler = PKSampler(dataset.teacher_train.labels, c.batch // k, k, seed=seed)
        if sampler.note:
            run.say(f"teacher: {sampler.note}")
    loader = Loader(
        dataset.teacher_train, data, c.batch, seed=seed, device=run.device, rank=run.rank,
        world=run.world, sampler=sampler,
    )  # fmt: skip
    optimiser = optim.make(c, [recogniser])
    net = run.wrap(recogniser)
    modules = {"teacher": recogniser}
    recogniser.train()
    phase = run.phase("teacher", modules, optimiser, loader, c, folder)
    for batch in phase:
        with run.autocast():
            e_t = net(batch.x_h())
        if recogniser.classified:
            task = F.cross_entropy(recogniser.logits(e_t, batch.y), batch.y)
        else:  # triplets of the global batch
            unit = run.gather_with_gradient(F.normalize(e_t.float(), dim=1))
            task = triplet(unit, run.gather(batch.y), teacher.margin)
        penalty = recogniser.penalty
        loss = task + penalty
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = optim.clip(optimiser, c.clip)
        phase.log(batch, loss=loss, penalty=penalty, gradient=norm)
        optimiser.step()
    recogniser.eval()


def _load_own(
    run: Run, recogniser: Recogniser, teacher: Teacher, data: Data, dataset: DataSet
) -> None:
    """A checkpoint of the user's: the whole recogniser, or a backbone whose head is then fitted."""
    path = Path(teacher.checkpoint).expanduser()
    if not path.is_file():
        raise ValueError(f"--teacher.checkpoint {path}: no such file")
    try:
        restore(recogniser, path)  # one that a run here wrote, with its head
        run.say(f"teacher: {path}")
        return
    except ValueError as error:
        if "backbone." in str(error).partition("unexpected")[2]:
            raise
    bgr = {"auto": None, "rgb": False, "bgr": True}[teacher.colours]
    layout = checkpoints.load_backbone(recogniser.backbone, path, bgr=bgr)
    if layout.kept:
        raise ValueError(
            f"--teacher.checkpoint {path}: {layout}; a trunk whose embedding is random cannot "
            "teach. Train it first: --teacher.weights instead starts from it"
        )
    run.say(f"teacher: backbone from {path} ({layout})")
    if recogniser.head is not None:
        _fit_head(run, recogniser, teacher, data, dataset, path)


def _fit_head(
    run: Run, recogniser: Recogniser, teacher: Teacher, data: Data, dataset: DataSet, path: Path
) -> None:
    """Class means by one pass over the training images, kept in the cache."""
    folder = _folder(run, teacher, data, dataset, _hash_of(path))
    fitted = folder / "teacher.safetensors"
    with locked(folder, run.say) if run.rank == 0 else contextlib.nullcontext():
        found = run.broadcast(fitted.is_file())
        if not found and run.rank == 0:
            loader = Loader(dataset.teacher_train, data, 2, seed=0, device=run.device)
            recogniser.eval()
            total = -(-len(loader.images) // 256)
            images = tqdm(loader.plain(), "fitting the head", total, leave=False, disable=None)
            with run.autocast():
                class_means(recogniser, ((recogniser(x), y) for _, x, y in images))
            save(recogniser, fitted, teacher=teacher.name)
    run.broadcast(None)
    restore(recogniser, fitted)
    run.say(f"teacher: head fitted to the class means of its embeddings, kept in {folder}")


def _hash_of(weights: str | Path) -> str:
    """sha256 of a file of weights; "" for what is none (which is then refused, or downloaded)."""
    path = Path(weights).expanduser()
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(
    run: Run, teacher: Teacher, data: Data, dataset: DataSet, made_of: str = ""
) -> Path:
    seen = {k: v for k, v in dataclasses.asdict(data).items() if k not in _STUDENT_ONLY}
    seen["box"] = data.quality == "unlocalised"  # what the teacher sees of a picture
    c = run.config
    own = {k: v for k, v in dataclasses.asdict(teacher).items() if k not in _OF_OUTPUTS}
    if made_of:  # wherever the file lies
        del own["weights"], own["checkpoint"]
    made_by = [SCHEMA, seen, own, dataset.teacher_classes, len(dataset.teacher_train)]
    if data.name == "faces":
        made_by.append(procedural.VERSION)
    if data.name in ("objects", "objects-retrieval"):
        made_by.append(objects.VERSION)
    if isinstance(dataset.teacher_train, Part):
        made_by.append(dataset.teacher_train.numbers.tolist())
    made_by += [made_of, dataset.fingerprint, c.seed, run.precision, run.device.type, run.world]
    key = digest(*made_by, torch.get_num_threads())
    folder = locate(c.cache) / "teachers" / f"{teacher.name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
