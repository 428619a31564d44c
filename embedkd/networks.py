"""Which maps of teacher and student hints and attention compare, and what must fit before that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from embedkd.config import Config, weights
from shared.models import build, count_parameters
from shared.models.recogniser import Recogniser


def stages(
    maps_s: Mapping[str, Tensor], maps_t: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """(student's, teacher's) map of each stage that both have, by its name: [B, C, h, w] each.

    The student's is the stage's output, the teacher's the last 3x3 convolution of the stage's last
    bottleneck ("stage1.inner"), where it has bottlenecks, or else the output too. Hints and
    attention alike. Source: Sec. 4.2, footnote 2 and Fig. 3.
    """
    return {
        name: (maps_s[name], maps_t.get(f"{name}.inner", maps_t[name]))
        for name in maps_s
        if name.startswith("stage") and not name.endswith(".inner") and name in maps_t
    }


def check(config: Config, students: Iterable[Config]) -> None:
    """ValueError where teacher and student cannot be compared as some of `students` asks."""
    asked = {name for one in students for name in weights(one)}
    if not asked & {"abs", "hint", "at"}:
        return
    with torch.device("meta"):  # shapes only
        sides = ((config.student, config.data.lr_input), (config.teacher, config.data.hr))
        (e_s, maps_s), (e_t, maps_t) = (
            Recogniser(replace(network, head="none"), side, 2)(
                torch.zeros(2, 3, side, side), maps=True
            )
            for network, side in sides
        )  # fmt: skip
    pair = f"--teacher.name {config.teacher.name} and --student.name {config.student.name}"
    if "abs" in asked and e_s.shape != e_t.shape:
        raise ValueError(
            f"{pair}: embeddings of {e_t.shape[1]} and {e_s.shape[1]} numbers; the absolute "
            "teacher needs equal ones, the relative teacher does not"
        )
    found = stages(maps_s, maps_t)
    if not found and asked & {"hint", "at"}:
        raise ValueError(f"{pair}: no stage that both have, so neither hints nor attention")
    for name, (s, t) in found.items():
        if "hint" in asked and s.shape != t.shape:
            sizes_t, sizes_s = (" x ".join(map(str, m.shape[1:])) for m in (t, s))
            raise ValueError(
                f"{pair}: {name} is {sizes_t} and {sizes_s} (channels x height x width); hints "
                "compare equal ones (imagenet-resnet101 and imagenet-resnet18 on images of one "
                "size), attention any"
            )


def sizes(names: Iterable[str]) -> str:
    """Parameters of networks with their 512-d embedding, a line each (Table 4)."""
    with torch.device("meta"):
        counts = {name: count_parameters(build(name, size=224, classes=0)) for name in names}
    return "\n".join(f"{name:<20}{n:>12,}  {n / 1e6:.2f} M" for name, n in counts.items())
