"""The networks of every run: backbones with heads, fitted, saved and restored."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision

from shared.config import Network
from shared.models import imagenet
from shared.models.recogniser import (
    HEADS,
    Recogniser,
    begin,
    class_means,
    copy_matching,
    restore,
    save,
)
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


@pytest.mark.parametrize("name", ["small-student", "resnet8", "mobilenet-0.25"])
def test_without_a_head_there_are_no_logits_and_all_that_is_trained_gets_a_gradient(name) -> None:
    recogniser = Recogniser(Network(name, head="none"), 16, 5)
    e, y = recogniser(torch.randn(4, 3, 16, 16)), torch.arange(4)
    assert e.shape == (4, recogniser.dim) and float(recogniser.penalty) == 0
    found = [recogniser.logits(e), recogniser.logits(e, y), *recogniser.logit_pair(e, y)]
    found.append(recogniser.logits(e.bfloat16()))
    assert all(z.shape == (4, 0) and z.dtype == torch.float32 for z in found)
    e.square().sum().backward()
    idle = {n for n, p in recogniser.named_parameters() if p.grad is None}
    assert idle == {n for n, p in recogniser.named_parameters() if not p.requires_grad}
    assert idle == ({"backbone.fc.weight", "backbone.fc.bias"} if name == "resnet8" else set())
    assert all(n.startswith("backbone.") for n in recogniser.state_dict())


@pytest.mark.parametrize(
    "name", ["small-student", "small-assistant", "slim-resnet34", "resnet8", "imagenet-resnet18"]
)
def test_maps_are_those_of_the_bare_backbone(name: str) -> None:
    recogniser = Recogniser(Network(name, head="arcface"), 16, 5).eval()
    x = torch.randn(2, 3, 16, 16)
    e, maps = recogniser(x, maps=True)
    expected, theirs = recogniser.backbone(x)
    assert torch.equal(e, expected) and torch.equal(recogniser(x), e)
    assert list(maps) == list(theirs)
    assert all(torch.equal(maps[key], theirs[key]) for key in maps)


def quiet_run(said: list[str]) -> Run:
    found = SimpleNamespace(place=lambda m: m, in_turn=lambda load: load(), say=said.append)
    return found  # type: ignore[return-value]


def test_weights_fill_the_trunk_and_what_they_lack_is_said(tmp_path: Path) -> None:
    network = Network("small-student", head="none")
    source = Recogniser(network, 16, 5).backbone.state_dict()
    trunk = {k: v for k, v in source.items() if not k.startswith(("linear.", "bn."))}
    torch.save(trunk, tmp_path / "trunk.pth")
    said: list[str] = []
    torch.manual_seed(1)
    wanted = replace(network, weights=str(tmp_path / "trunk.pth"))
    found = begin(quiet_run(said), wanted, 16, 5).backbone.state_dict()
    torch.manual_seed(1)
    fresh = begin(quiet_run(said), network, 16, 5).backbone.state_dict()
    assert all(torch.equal(found[k], (trunk if k in trunk else fresh)[k]) for k in found)
    (line,) = said
    assert "trunk.pth" in line and "not in it and kept: 6 of the network (linear.weight" in line


def test_a_network_that_is_to_be_restored_asks_for_no_weights(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(imagenet, "_published", None)
    Recogniser(Network("imagenet-resnet18", weights="imagenet"), 16, 5)
    Recogniser(Network(weights=str(tmp_path / "none.pth")), 16, 5)


def test_imagenet_weights_leave_the_embedding_as_drawn(monkeypatch) -> None:
    public = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(imagenet, "_published", lambda name, weights: public)
    said: list[str] = []
    network = Network("imagenet-resnet18", head="none", weights="imagenet")
    backbone = begin(quiet_run(said), network, 32, 5).backbone
    state = backbone.state_dict()
    assert all(torch.equal(state[k], v) for k, v in public.items() if not k.startswith("fc."))
    assert state["embedding.weight"].std() > 0 and "torchvision" in said[0]


@pytest.mark.parametrize(
    ("flag", "name", "weights", "line"),
    [
        ("--assistant", "resnet8", "imagenet",
         "--assistant.weights imagenet: torchvision has no such weights for resnet8"),
        ("--student", "mobilenet-0.25", "imagenet",
         "--student.weights imagenet: torchvision has no"),
        ("--student", "small-student", "{}/none.pth", "--student.weights .*none.pth: no such file"),
        ("--teacher", "small-student", "{}/other.pth",
         "--teacher.weights .*other.pth does not fit SmallNet: .* missing .* unexpected"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_loaded_are_one_clear_line(
    flag: str, name: str, weights: str, line: str, tmp_path: Path
) -> None:
    torch.save(Recogniser(Network("resnet8"), 16, 5).backbone.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"^{line}") as info:
        begin(quiet_run([]), Network(name, weights=weights.format(tmp_path)), 16, 5, flag)
    assert "\n" not in str(info.value)


def test_a_student_starts_from_its_assistant_but_for_the_shortcut_it_has_not() -> None:
    torch.manual_seed(0)
    assistant = Recogniser(Network("small-assistant"), 64, 5)
    student = Recogniser(Network("small-student"), 16, 5)
    assert copy_matching(assistant, student) == []
    theirs = assistant.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in student.state_dict().items())
    student.backbone.linear.weight.data.zero_()  # a copy, no view
    assert assistant.backbone.linear.weight.any()
    larger = Recogniser(Network("small-student"), 32, 7)
    before = {k: v.clone() for k, v in larger.state_dict().items()}
    left = copy_matching(assistant, larger)
    assert left == ["backbone.linear.weight", "head.weight"]
    assert all(torch.equal(larger.state_dict()[k], before[k]) for k in left)


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
