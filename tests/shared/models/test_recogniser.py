"""The networks of every run: backbones with heads, fitted, saved and restored."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shared.config import Network
from shared.models.recogniser import HEADS, Recogniser, class_means, restore, save
from shared.run import Run


@pytest.mark.parametrize("head", HEADS)
def test_a_margin_head_of_a_saved_network_is_restored_with_its_statistics(
    head: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    one = Recogniser(Network(head=head), 16, 5)
    x, y = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    one.logits(one(x), y)
    save(one, tmp_path / "one.safetensors")
    other = Recogniser(Network(head=head), 16, 5)
    restore(other, tmp_path / "one.safetensors")
    one.eval(), other.eval()
    assert torch.equal(one.logits(one(x), y), other.logits(other(x), y))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(),
               other.state_dict().values(), strict=True))  # fmt: skip


def test_only_magface_has_a_penalty_and_it_reaches_the_embedding() -> None:
    for head in HEADS:
        recogniser = Recogniser(Network(head=head), 16, 5)
        embedding = (10 * torch.randn(4, recogniser.dim)).requires_grad_()
        recogniser.logits(embedding, torch.arange(4))
        penalty = torch.as_tensor(recogniser.penalty)
        assert (float(penalty.detach()) > 0) == (head == "magface")
        if head == "magface":
            (gradient,) = torch.autograd.grad(penalty, embedding)
            assert gradient.abs().sum() > 0
    assert Recogniser(Network("resnet8", head="softmax"), 16, 5).penalty == 0.0


@pytest.mark.parametrize(
    "name,size", [("iresnet18", 32), ("adaface-ir18", 32), ("mobilenet-0.25", 32)]
)
def test_face_and_retrieval_networks_are_saved_and_restored(
    name: str, size: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    one, other = (Recogniser(Network(name), size, 3).eval() for _ in range(2))
    save(one, tmp_path / "one.safetensors")
    restore(other, tmp_path / "one.safetensors")
    x = torch.randn(2, 3, size, size)
    assert torch.equal(one(x), other(x)) and one(x).shape == (2, one.dim)
    with pytest.raises(ValueError, match="has no classifier of its own"):
        Recogniser(Network(name, head="softmax"), size, 3)


def test_class_means_are_the_means_of_unit_embeddings_batch_by_batch() -> None:
    torch.manual_seed(0)
    recogniser = Recogniser(Network(), 16, 4)
    e, y = torch.randn(23, recogniser.dim), torch.arange(23) % 4
    order = torch.randperm(23)
    class_means(recogniser, ((e[i], y[i]) for i in order.split(5)))
    for k in range(4):
        unit = [v.double() / v.double().norm() for v in e[y == k]]
        mean = torch.stack(unit).sum(0)
        assert torch.allclose(recogniser.head.weight[k].double(), mean / mean.norm(), atol=1e-6)


def test_a_classifier_that_a_margin_head_replaces_gets_no_gradient() -> None:
    """Data-parallel training would wait for its gradients for ever."""
    recogniser = Recogniser(Network("resnet8", head="cosface"), 16, 5)
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    torch.nn.functional.cross_entropy(recogniser.logits(recogniser(x), y), y).backward()
    idle = {n for n, p in recogniser.named_parameters() if p.grad is None}
    assert idle == {n for n, p in recogniser.named_parameters() if not p.requires_grad}
    assert idle == {"backbone.fc.weight", "backbone.fc.bias"}
    softmax = Recogniser(Network("resnet8", head="softmax"), 16, 5)
    assert all(p.requires_grad for p in softmax.parameters())


@pytest.mark.parametrize("head", ["curricularface", "adaface"])
def test_running_statistics_are_those_of_the_global_batch(head: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda m, **_: m)
    halves = [torch.randn(4, 128), 3 + torch.randn(4, 128)]
    labels = torch.tensor([0, 1, 2, 3])
    run = SimpleNamespace(
        config=SimpleNamespace(compile=False), world=2, device=torch.device("cpu"),
        gather=lambda local: torch.cat([local, other]),
    )  # fmt: skip
    torch.manual_seed(0)
    whole = Recogniser(Network(head=head), 16, 4)
    ranked = copy.deepcopy(whole)
    whole.logits(torch.cat(halves), labels.repeat(2))
    unit = torch.nn.functional.normalize(ranked.head.weight)
    cosine = (torch.nn.functional.normalize(halves[1]) @ unit.T).gather(1, labels[:, None])
    other = cosine.detach() if head == "curricularface" else halves[1].norm(dim=1, keepdim=True)
    Run.wrap(run, ranked)  # type: ignore[arg-type]
    ranked.logits(halves[0], labels)
    for name, value in whole.head.named_buffers():
        if name != "penalty":
            assert torch.allclose(value, dict(ranked.head.named_buffers())[name], atol=1e-6), name
