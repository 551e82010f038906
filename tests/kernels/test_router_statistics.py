"""router_statistics against a slow oracle, and its edge cases."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from edgefed.errors import ConfigError
from edgefed.expert_records import LayerProfile
from edgefed.kernels.dispatch import why_not_native
from edgefed.kernels.router_statistics import GATE_KINDS, gate_of, new_statistics, router_statistics, to_layer_profile
from edgefed.native import isa_names, load_native

BACKENDS = ["reference", *(f"native:{isa}" for isa in (isa_names(load_native()) if why_not_native() is None else []))]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch) -> str:
    """Every test runs with every backend and every instruction set of this processor."""
    name, _, isa = request.param.partition(":")
    monkeypatch.setenv("EDGEFED_KERNELS", name)
    if isa:
        monkeypatch.setenv("EDGEFED_ISA", isa)
    return name


def _batch(num_tokens: int, num_experts: int, top_k: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    gate = torch.softmax(3 * torch.randn(num_tokens, num_experts, generator=generator), dim=1)
    weights, indices = gate.topk(top_k, dim=1)
    return gate, indices, 2.5 * weights


def _oracle(batches, num_experts: int) -> dict[str, list[float]]:
    required = [field.name for field in dataclasses.fields(LayerProfile) if field.default is dataclasses.MISSING]
    names = [name for name in required if name != "num_tokens"]  # what other sources add is optional
    result = {name: [0.0] * num_experts for name in names}
    for gate, indices, weights in batches:
        for row, chosen, weight in zip(gate.tolist(), indices.tolist(), weights.tolist(), strict=True):
            for expert, g in enumerate(row):
                result["gate_sum"][expert] += g
                result["gate_max"][expert] = max(result["gate_max"][expert], g)
                result["gate_log_sum"][expert] += g * math.log(g) if g > 0 else 0.0
                result["gate_complement_log_sum"][expert] += (1 - g) * math.log1p(-g) if g < 1 else 0.0
            for expert, w in zip(chosen, weight, strict=True):
                result["tokens_per_expert"][expert] += 1
                result["routed_gate_sum"][expert] += w
    return result


@pytest.mark.parametrize(
    ("sizes", "num_experts", "top_k"),
    [([5], 4, 2), ([3, 7, 1], 8, 3), ([0, 4], 6, 1), ([0], 3, 2)],
    ids=["one batch", "three batches", "an empty batch changes nothing", "only an empty batch"],
)
def test_equals_oracle(sizes, num_experts, top_k):
    batches = [_batch(size, num_experts, top_k, seed) for seed, size in enumerate(sizes)]
    statistics = new_statistics(num_experts)
    for batch in batches:
        router_statistics(statistics, *batch)
    record = to_layer_profile(statistics, sum(sizes))
    assert record.num_tokens == sum(sizes)
    for name, expected in _oracle(batches, num_experts).items():
        np.testing.assert_allclose(getattr(record, name), expected, rtol=1e-6, atol=1e-9, err_msg=name)


def test_invariants():
    """G sums to 1 a token, K experts are chosen a token, and the gate of an expert is at most 1."""
    gate, indices, weights = _batch(200, 16, 4, 0)
    statistics = new_statistics(16)
    router_statistics(statistics, gate, indices, weights)
    record = to_layer_profile(statistics, 200)
    assert record.gate_sum.sum() == pytest.approx(200)
    assert record.tokens_per_expert.sum() == 800
    assert (record.gate_max <= 1).all()
    assert (record.gate_log_sum <= 0).all()


def test_a_gate_of_zero_gives_no_nan():
    gate = torch.tensor([[0.0, 1.0]])
    statistics = new_statistics(2)
    router_statistics(statistics, gate, torch.tensor([[1]]), torch.tensor([[1.0]]))
    record = to_layer_profile(statistics, 1)
    assert record.gate_log_sum.tolist() == [0.0, 0.0]
    assert record.gate_complement_log_sum.tolist() == [0.0, 0.0]


def test_the_complement_of_a_small_gate_does_not_vanish():
    """1 - 1e-9 rounds to 1 in float32, whose logarithm would be 0; to first order (1 - G) ln(1 - G) = -G."""
    statistics = new_statistics(2)
    gate = torch.tensor([[1e-9, 1.0]])
    router_statistics(statistics, gate, torch.tensor([[1]]), torch.tensor([[1.0]]))
    assert to_layer_profile(statistics, 1).gate_complement_log_sum[0] == pytest.approx(-1e-9)


def test_keeps_no_graph():
    gate = torch.softmax(torch.randn(4, 3, requires_grad=True), dim=1)
    statistics = new_statistics(3)
    router_statistics(statistics, gate, gate.topk(1).indices, gate.topk(1).values)
    assert not statistics.requires_grad


def test_bfloat16_counts_beyond_its_precision():
    """300 tokens of gate 1/2 sum to 150 in float64; bfloat16 would stop far below."""
    gate = torch.full((300, 2), 0.5, dtype=torch.bfloat16)
    statistics = new_statistics(2)
    router_statistics(
        statistics, gate, torch.zeros(300, 1, dtype=torch.int64), torch.ones(300, 1, dtype=torch.bfloat16)
    )
    record = to_layer_profile(statistics, 300)
    assert record.gate_sum.tolist() == [150.0, 150.0]
    assert record.routed_gate_sum.tolist() == [300.0, 0.0]


@pytest.mark.parametrize(
    ("statistics", "gate", "indices", "weights"),
    [((6, 4), (3, 5), (3, 2), (3, 2)), ((5, 5), (3, 5), (3, 2), (3, 2)), ((6, 5), (3, 5), (4, 2), (4, 2)),
     ((6, 5), (3, 5), (3, 2), (3, 1))],
    ids=["other expert count", "other rows", "other token count", "indices and weights differ"],
)  # fmt: skip
def test_refuses_shapes(statistics, gate, indices, weights):
    with pytest.raises(ValueError, match=r"\("):
        router_statistics(
            torch.zeros(statistics), torch.zeros(gate), torch.zeros(indices, dtype=torch.int64), torch.zeros(weights)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 3), (200, 64), (300, 17)])
def test_logits_give_what_their_probabilities_give(num_tokens, num_experts, kind, dtype):
    """In float64, from the same logits; rows with an expert that takes all, and one that gets nothing."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits = (4 * torch.randn(num_tokens, num_experts, generator=generator)).to(dtype)
    logits[0, 0], logits[-1, 1] = 300.0, -300.0
    router = gate_of(logits, "softmax").to(dtype) if kind == "probability" else logits
    exact = router.double() if kind == "probability" else gate_of(router.double(), kind)
    weights, indices = exact.topk(2, dim=1)
    weights = weights.to(dtype)
    found, expected = new_statistics(num_experts), new_statistics(num_experts)
    for _ in range(2):
        router_statistics(found, router, indices, weights, kind=kind)
        router_statistics(expected, exact, indices, weights.double(), backend="reference")
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


def test_an_expert_masked_by_an_infinite_logit_adds_nothing():
    logits = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = -torch.inf
    weights, indices = torch.softmax(logits, dim=1).topk(2, dim=1)
    found, expected = new_statistics(20), new_statistics(20)
    router_statistics(found, logits, indices, weights, kind="softmax")
    router_statistics(expected, gate_of(logits.double(), "softmax"), indices, weights, backend="reference")
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)
    assert found[:, 3].eq(0).all()


def test_attention_is_added_to_the_experts_of_each_token(backend):
    gate, indices, weights = _batch(90, 8, 2, 0)
    received = torch.rand(90, generator=torch.Generator().manual_seed(1))
    found, without = new_statistics(8, attention=True), new_statistics(8)
    for rows in (slice(0, 90), slice(0, 0), slice(10, 11)):
        router_statistics(found, gate[rows], indices[rows], weights[rows], received=received[rows])
        router_statistics(without, gate[rows], indices[rows], weights[rows])
    expected = torch.zeros(8, dtype=torch.float64)
    for token in (*range(90), 10):
        for expert in indices[token].tolist():
            expected[expert] += float(received[token])
    record = to_layer_profile(found, 91)
    np.testing.assert_allclose(record.attention_sum, expected.numpy(), rtol=1e-12)
    assert torch.equal(found[:6], without)
    assert to_layer_profile(without, 91).attention_sum is None
    for sums, each in ((without, received), (found, None), (found, received[1:])):
        with pytest.raises(ValueError, match=r"must be \("):
            router_statistics(sums, gate, indices, weights, received=each)


def test_an_index_out_of_range_is_an_error_and_adds_nothing(backend):
    gate, indices, weights = _batch(5, 4, 2, 0)
    statistics = new_statistics(4)
    for bad in (4, -1):
        indices[3, 1] = bad
        with pytest.raises((IndexError, RuntimeError)):
            router_statistics(statistics, gate, indices, weights)
        if backend == "native":
            assert statistics.eq(0).all()


def test_the_number_of_threads_changes_no_bit():
    gate, indices, weights = _batch(900, 32, 4, 0)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            statistics = new_statistics(32)
            router_statistics(statistics, gate, indices, weights)
            results.append(statistics)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=1e-12, atol=0)


def test_unknown_names_are_refused():
    gate, indices, weights = _batch(5, 4, 2, 0)
    with pytest.raises(ValueError, match="hardmax"):
        router_statistics(new_statistics(4), gate, indices, weights, kind="hardmax")
    with pytest.raises(ConfigError, match="quantum"):
        router_statistics(new_statistics(4), gate, indices, weights, backend="quantum")
