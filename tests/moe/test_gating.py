"""Gate probabilities, and the choice among resident experts, against slow oracles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.moe.gate_probe import GATE_KINDS, gate_probabilities, gate_scores, route_to_resident


def logits_of(kind: str, shape, seed=0) -> torch.Tensor:
    logits = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.softmax(logits, dim=-1) if kind == "probability" else logits


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_probabilities_sum_to_one(kind):
    gate = gate_probabilities(logits_of(kind, (9, 5)), kind)
    torch.testing.assert_close(gate.sum(dim=1), torch.ones(9, dtype=torch.float64))
    assert (gate >= 0).all()


def test_sigmoid_far_below_zero_is_not_nan():
    assert gate_probabilities(torch.full((1, 4), -200.0), "sigmoid").isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(GATE_KINDS),
    num_experts=st.integers(1, 7),
    top_k=st.integers(1, 7),
    resident=st.sets(st.integers(0, 6), min_size=1),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_a_token_by_token_oracle(kind, num_experts, top_k, resident, biased, seed):
    top_k = min(top_k, num_experts)
    resident = sorted(expert for expert in resident if expert < num_experts) or [0]
    resident.reverse()  # slots need not be in expert order
    logits = logits_of(kind, (6, num_experts), seed)
    bias = torch.rand(num_experts, generator=torch.Generator().manual_seed(seed)).double() if biased else None
    scores = gate_scores(logits, kind)
    order = scores if bias is None else scores + bias
    indices = order.topk(top_k, dim=1).indices
    weights = 2.5 * scores.gather(1, indices)
    slots = torch.tensor([resident.index(e) if e in resident else -1 for e in range(num_experts)])
    got_slots, got_weights = route_to_resident(logits, slots[indices], weights, torch.tensor(resident), kind, bias)
    for token in range(6):
        if (slots[indices[token]] >= 0).all():
            assert torch.equal(got_slots[token], slots[indices[token]])
            assert torch.equal(got_weights[token], weights[token])
            continue
        best = sorted(resident, key=lambda expert: -order[token, expert].item())[:top_k]
        total = sum(scores[token, expert] for expert in best)
        expected = {resident.index(e): scores[token, e] / total * weights[token].sum() for e in best}
        got = {int(s): w for s, w in zip(got_slots[token], got_weights[token], strict=True) if s >= 0}
        assert got.keys() == expected.keys()
        for slot, weight in got.items():
            torch.testing.assert_close(weight, expected[slot], rtol=1e-9, atol=1e-12)
        assert got_weights[token][got_slots[token] < 0].eq(0).all()


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_differentiable_to_the_router(kind):
    logits = logits_of(kind, (4, 5)).requires_grad_()
    indices = logits.topk(2, dim=1).indices
    slots = torch.tensor([0, 1, 2, -1, -1])[indices]
    assert (slots < 0).any()
    resident = torch.tensor([0, 1, 2])

    def weights_of(logits):
        weights = gate_scores(logits, kind).gather(1, indices)
        return route_to_resident(logits, slots, weights, resident, kind)[1]

    assert torch.autograd.gradcheck(weights_of, (logits,))


def test_far_logits_give_finite_gradients():
    """All residents 200 below the chosen one: their probabilities underflow, their shares must not."""
    logits = torch.tensor([[0.0, -200.0, -201.0]], requires_grad=True)
    weights = torch.softmax(logits, dim=1)[:, :1]
    _, routed = route_to_resident(logits, torch.tensor([[-1]]), weights, torch.tensor([1, 2]), "softmax")
    routed.sum().backward()
    assert routed.item() == pytest.approx(1.0)
    assert logits.grad.isfinite().all()
