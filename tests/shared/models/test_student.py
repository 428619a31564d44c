"""What a student is shown: the same bits in training, in scoring, and on a camera."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.config import Data, Network
from shared.data.pipeline import Loader, Resident, normalise
from shared.degrade import low, to_float
from shared.models.recogniser import (
    Recogniser,
    Student,
    enrolled_reader,
    load_trained,
    reader,
    save,
)

SEEN = Data(hr=16, lr=6, shift=2, shift_step=2)


def of_data(data: Data) -> tuple[Recogniser, list[torch.Tensor]]:
    """A network of a student of `data`, and a list of the inputs that reach it."""
    torch.manual_seed(0)
    recogniser, inputs = Recogniser(Network(), data.lr_input, 5).eval(), []
    recogniser.backbone.register_forward_pre_hook(lambda _, x: inputs.append(x[0].clone()))
    return recogniser, inputs


@pytest.mark.parametrize("quality", ["small", "enlarged"])
@pytest.mark.parametrize("lr", [6, 16])
def test_a_student_is_scored_on_the_bits_that_it_is_trained_on(quality: str, lr: int) -> None:
    data = replace(SEEN, quality=quality, lr=lr)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (9, 3, 16, 16), generator=generator, dtype=torch.uint8)
    loader = Loader(Resident(pixels, torch.arange(9)), data, 9, seed=0, device=torch.device("cpu"))
    recogniser, inputs = of_data(data)
    small = low(pixels, lr, mode="bicubic", antialias=True)
    with torch.no_grad():
        embedding = reader(recogniser, data, "faces")(pixels)
        assert torch.equal(Student(recogniser, data, "faces")(small), embedding)
        assert torch.equal(Student(recogniser, data, "faces")(to_float(small)), embedding)
    side = 16 if quality == "enlarged" else lr
    assert inputs[0].shape == (9, 3, side, side) and data.lr_input == side
    assert torch.equal(inputs[0], inputs[1]) and torch.equal(inputs[0], inputs[2])
    seen = 0
    for epoch in range(40):
        (batch,) = loader.epoch(epoch)
        plain = batch.view == loader.views.identity
        assert torch.equal(batch.x_l()[plain], inputs[0][batch.index[plain]])
        seen += int(plain.sum())
    assert seen


def test_a_network_whose_input_is_enlarged_enrols_faces_as_they_are() -> None:
    recogniser, inputs = of_data(SEEN)
    assert enrolled_reader(recogniser, SEEN) is None
    data = replace(SEEN, quality="enlarged")
    recogniser, inputs = of_data(data)
    enrol = enrolled_reader(recogniser, data)
    pixels = torch.arange(768, dtype=torch.int64).remainder(256).to(torch.uint8).view(1, 3, 16, 16)
    assert enrol is not None and enrol(pixels).shape == (1, recogniser.dim)
    assert torch.equal(inputs[0], normalise(pixels, data))


def test_a_kept_student_is_built_for_its_own_input(tmp_path: Path) -> None:
    """The fully connected layer of a network of native size has as many weights as its input."""
    data = replace(SEEN, quality="enlarged", hr=32, lr=16)
    network = Network("iresnet18")
    torch.manual_seed(0)
    recogniser = Recogniser(network, data.lr_input, 5).eval()
    (tmp_path / "students").mkdir()
    facts = {"classes": "5", "task": "faces"}
    save(recogniser, tmp_path / "students" / "own.safetensors", **facts)
    found = load_trained(tmp_path, network, data, "own")
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(found(x), Student(recogniser, data, "faces")(x))
