"""Optimisers against plain loops of their published updates, and through a checkpoint."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

from shared import optim
from shared.config import Optim
from shared.files import read_checkpoint, write_checkpoint
from shared.models import create


def gradients(steps: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(size=(3, 4)) * 10.0 ** random.integers(-3, 2) for _ in range(steps)]


def stepped(config: Optim, start: np.ndarray, rates: list[float]) -> np.ndarray:
    """A float64 parameter after the optimiser's own steps under given gradients."""
    layer = nn.Linear(4, 3, bias=False).double()
    layer.weight.data = torch.tensor(start)
    optimiser = optim.make(config, [layer])
    for g, rate in zip(gradients(len(rates)), rates, strict=True):
        layer.weight.grad = torch.tensor(g)
        optim.set_rate(optimiser, rate)
        optimiser.step()
    return layer.weight.detach().numpy()


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_adam_is_kingma_and_bas_update_with_the_decay_in_the_gradient(decay: float) -> None:
    w = np.random.default_rng(1).normal(size=(3, 4))
    rates = [0.01 / (1 + k) for k in range(12)]
    found = stepped(Optim(method="adam", lr=0.01, weight_decay=decay), w, rates)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, rate) in enumerate(zip(gradients(12), rates, strict=True), start=1):
        g = g + decay * w
        m = 0.9 * m + (1 - 0.9) * g
        v = 0.999 * v + (1 - 0.999) * g**2
        w = w - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert np.allclose(found, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_momentum_with_the_decay_in_the_gradient(nesterov: bool) -> None:
    w = np.random.default_rng(1).normal(size=(3, 4))
    rates, b = [0.1] * 5 + [0.01] * 5, np.zeros_like(w)
    found = stepped(Optim(momentum=0.8, nesterov=nesterov, weight_decay=0.2), w, rates)
    for g, rate in zip(gradients(10), rates, strict=True):
        g = g + 0.2 * w
        b = 0.8 * b + g
        w = w - rate * (g + 0.8 * b if nesterov else b)
    assert np.allclose(found, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_a_frozen_parameter_is_left_out(method: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimiser = optim.make(Optim(method=method), [model])  # type: ignore[arg-type]
    (group,) = optimiser.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model[1].parameters()}


@pytest.mark.parametrize("method", ["sgd", "adam"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_state_goes_through_a_checkpoint_bit_for_bit(tmp_path, method, channels_last) -> None:
    """Ten steps at once, and with a stop after the fourth; also where weights lie channels-last,
    as the fused step reads them in the order in which they lie."""
    config = Optim(method=method, lr=1e-2)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = create("small-student", dim=8)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model, optim.make(config, [model])

    def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            optim.set_rate(optimiser, 1e-2 / (1 + step))
            optimiser.zero_grad(set_to_none=True)
            model(x)[0].square().sum().backward()  # type: ignore[operator]
            optimiser.step()

    whole = fresh()
    train(*whole, range(10))
    first = fresh()
    train(*first, range(4))
    state = {"schema": 1, "m": first[0].state_dict(), "o": first[1].state_dict()}
    write_checkpoint(tmp_path / "last.ckpt", state)
    kept = read_checkpoint(tmp_path / "last.ckpt")
    second = fresh()
    second[0].load_state_dict(kept["m"])
    second[1].load_state_dict(kept["o"])
    train(*second, range(4, 10))
    for a, b in zip(whole, second, strict=True):
        one, other = io.BytesIO(), io.BytesIO()
        torch.save(a.state_dict(), one)
        torch.save(b.state_dict(), other)
        assert one.getvalue() == other.getvalue()


def test_the_rate_warms_up_and_falls() -> None:
    c = Optim(lr=1.0, warmup=0.1, schedule="step", milestones=(2, 3), gamma=0.5)
    rates = [optim.rate(c, step, 40, 10) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and set(rates[4:20]) == {1.0}
    assert set(rates[20:30]) == {0.5} and set(rates[30:]) == {0.25}


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_poly_falls_to_0_as_the_power_of_the_steps_left(power: float) -> None:
    c = Optim(lr=0.2, warmup=0.08, schedule="poly", power=power)
    rates = [optim.rate(c, step, 25, 1) for step in range(26)]
    assert rates[:3] == [0.1, 0.2, 0.2]
    left = [(25 - step) / 23 for step in range(2, 26)]
    assert rates[2:] == pytest.approx([0.2 * share**power for share in left], abs=1e-15)
    assert rates[25] == 0
    with pytest.raises(ValueError, match="--optim.power -1: must be 0 or more"):
        Optim(power=-1)
