from __future__ import annotations

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crrcd.model import FeatureQueue, RelationCritic, RelationModule


def test_relation_module_is_phi_relu_phi_i_minus_phi_j() -> None:
    torch.manual_seed(0)
    f = RelationModule(5, 3, 4).double()
    a, b = torch.randn(2, 5).double(), torch.randn(2, 3).double()
    state = {k: v.tolist() for k, v in f.state_dict().items()}

    def linear(name: str, x: list[float]) -> list[float]:
        return [
            sum(w * v for w, v in zip(row, x, strict=True)) + bias
            for row, bias in zip(state[f"{name}.weight"], state[f"{name}.bias"], strict=True)
        ]

    for row in range(2):
        pairs = zip(linear("phi_i", a[row].tolist()), linear("phi_j", b[row].tolist()), strict=True)
        expected = linear("phi", [max(0.0, p - q) for p, q in pairs])
        torch.testing.assert_close(f(a, b)[row], torch.tensor(expected).double())


def test_critic_cosines_are_those_of_the_two_relation_networks_and_projections() -> None:
    """The merged matrices and the kernel against phi and h applied one after the other."""
    torch.manual_seed(1)
    critic = RelationCritic(6, 5, 4).double()
    e_t, e_s, partner = (torch.randn(3, d).double() for d in (6, 5, 6))
    queue, index = torch.randn(8, 6).double(), torch.tensor([[0, 7], [3, 3], [5, 1]])
    pos, neg = critic(e_t, e_s, partner, queue, index)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    query = unit(critic.h2(critic.F_ts(partner, e_s))).detach()
    for j in range(3):
        key = unit(critic.h1(critic.F_t(partner[j : j + 1], e_t[j : j + 1])))[0]
        assert pos[j].item() == pytest.approx((query[j] @ key).item(), abs=1e-12)
        for c, k in enumerate(index[j]):
            key = unit(critic.h1(critic.F_t(partner[j : j + 1], queue[k : k + 1])))[0]
            assert neg[j, c].item() == pytest.approx((query[j] @ key).item(), abs=1e-12)


def test_gradients_reach_the_student_and_the_relation_networks_only() -> None:
    torch.manual_seed(2)
    critic = RelationCritic(6, 5, 4)
    e_t, e_s = torch.randn(3, 6), torch.randn(3, 5, requires_grad=True)
    pos, neg = critic(e_t, e_s, e_t.roll(1, 0), torch.randn(8, 6), torch.randint(8, (3, 4)))
    (pos.sum() - neg.sum()).backward()
    assert e_s.grad is not None and e_s.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters())


# -- the queue -----------------------------------------------------------------------------------


def filled(labels: list[int], index: list[int]) -> FeatureQueue:
    queue = FeatureQueue(len(labels), 2)
    features = torch.arange(2.0 * len(labels)).view(-1, 2)
    queue.push(features, torch.tensor(labels), torch.tensor(index))
    return queue


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_queue_draws_only_what_the_policy_allows(data: st.DataObject) -> None:
    size = data.draw(st.integers(4, 60))
    classes = data.draw(st.integers(2, 6))
    images = data.draw(st.lists(st.integers(0, 25), min_size=size, max_size=size))
    queue = filled([i % classes for i in images], images)  # an image's label is its own
    y = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=3, max_size=3)))
    exclude = torch.tensor(data.draw(st.lists(st.integers(0, 30), min_size=3, max_size=3)))
    policy = data.draw(st.sampled_from(["supervised", "unsupervised"]))
    drawn = queue.sample(y, 64, exclude=exclude, policy=policy, generator=torch.Generator())
    for row in range(3):
        allowed = {
            p
            for p, image in enumerate(images)
            if image != exclude[row] and (policy == "unsupervised" or image % classes != y[row])
        } or set(range(size))
        assert set(drawn[row].tolist()) <= allowed


@pytest.mark.parametrize("policy", ["supervised", "unsupervised"])
def test_queue_draws_uniformly_over_what_is_allowed(policy: str) -> None:
    images = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]  # label = image % 3; some images twice
    queue = filled([i % 3 for i in images], images)
    y, exclude = torch.tensor([1]), torch.tensor([2])
    drawn = queue.sample(
        y, 60_000, exclude=exclude, policy=policy, generator=torch.Generator().manual_seed(0)
    )
    counts = collections.Counter(drawn[0].tolist())
    allowed = [
        p for p, i in enumerate(images) if i != 2 and (policy == "unsupervised" or i % 3 != 1)
    ]
    assert sorted(counts) == allowed
    expected = 60_000 / len(allowed)
    chi2 = sum((counts[p] - expected) ** 2 / expected for p in allowed)
    assert chi2 < 40  # 99.99 % point of chi-square with 11 degrees of freedom is 35


def test_queue_drops_the_oldest() -> None:
    queue = FeatureQueue(5, 1)
    for step in range(4):
        at = torch.tensor([2 * step, 2 * step + 1])
        queue.push(at[:, None].float(), at % 2, at)
    assert sorted(queue.index.tolist()) == [3, 4, 5, 6, 7]
    assert all(queue.features[p, 0] == queue.index[p] for p in range(5))


def test_queue_state_continues_where_it_was() -> None:
    one, two = FeatureQueue(6, 2), FeatureQueue(6, 2)
    one.push(torch.randn(4, 2), torch.arange(4), torch.arange(4))
    two.load_state_dict(one.state_dict())
    more = (torch.randn(4, 2), torch.arange(4), torch.arange(4, 8))
    one.push(*more)
    two.push(*more)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))


def test_queue_keeps_no_gradient() -> None:
    queue = FeatureQueue(4, 2)
    queue.push(torch.randn(2, 2, requires_grad=True), torch.arange(2), torch.arange(2))
    assert not queue.features.requires_grad


def test_a_queue_of_one_class_is_refused() -> None:
    queue = FeatureQueue(4, 2)
    batch = (torch.arange(4), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="single class"):
        queue.fill(lambda x: (x, x), [batch])


def test_a_batch_larger_than_the_queue_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        FeatureQueue(3, 2).push(torch.zeros(4, 2), torch.arange(4), torch.arange(4))
