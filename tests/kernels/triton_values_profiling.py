"""router_statistics and the quantizers in Triton against their references. Run by test_triton_values.py."""

from __future__ import annotations

import pytest
import torch

from edgefed.kernels import quantization
from edgefed.kernels import router_statistics as reference
from edgefed.moe.gate_probe import gate_probabilities
from edgefed.triton_kernels import quantize
from edgefed.triton_kernels import router_statistics as module
from edgefed.triton_kernels.router_statistics import GATE_KINDS, router_statistics
from edgefed.triton_kernels.tensor_types import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "attention"),
    [(70, 6, 2, True), (1, 64, 8, False), (50, 300, 2, True), (3, 1, 1, True)],
)
def test_statistics_equal_the_reference(monkeypatch, kind, num_tokens, num_experts, top_k, attention):
    monkeypatch.setattr(module, "MAX_PROGRAMS", 3)  # so that a program has more than one tile of tokens
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_tokens, num_experts, generator=generator) * 3
    indices = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    weights = torch.rand(num_tokens, top_k, generator=generator)
    logits, indices, weights = logits.to(DEVICE), indices.to(DEVICE), weights.to(DEVICE)
    scores = gate_probabilities(logits, "softmax") if kind == "probability" else logits
    gate = gate_probabilities(scores, kind)
    ours, expected = (reference.new_statistics(num_experts, DEVICE, attention=attention) for _ in range(2))
    received = torch.rand(num_tokens, generator=generator).to(DEVICE) if attention else None
    for _ in range(2):  # it accumulates
        router_statistics(ours, scores, indices, weights, kind, received)
        reference.router_statistics(expected, gate, indices, weights, received=received)
    assert torch.equal(ours[reference.TOKENS_PER_EXPERT], expected[reference.TOKENS_PER_EXPERT])
    torch.testing.assert_close(ours, expected, rtol=3e-6, atol=1e-7)


def test_gates_of_zero_and_one_count_as_their_limits():
    gate = torch.tensor([[1.0, 0.0, 0.0], [1e-7, 1.0 + 1e-7, 0.0], [1.0, 0.0, 1e-30]], device=DEVICE)
    indices = torch.tensor([[0], [1], [0]], device=DEVICE)
    ours, expected = reference.new_statistics(3, DEVICE), reference.new_statistics(3, DEVICE)
    router_statistics(ours, gate, indices, torch.ones(3, 1, device=DEVICE))
    reference.router_statistics(expected, gate, indices, torch.ones(3, 1, device=DEVICE))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-12)


def test_no_token_changes_nothing_and_shapes_are_checked():
    statistics = reference.new_statistics(4, DEVICE)
    none = torch.zeros(0, 2, device=DEVICE)
    router_statistics(statistics, torch.zeros(0, 4, device=DEVICE), none.long(), none)
    assert statistics.eq(0).all()
    with pytest.raises(ValueError, match=r"\(6, E\)"):
        router_statistics(statistics, torch.zeros(2, 5, device=DEVICE), none.long(), none)
    with pytest.raises(ValueError, match="T = 2"):
        router_statistics(statistics, torch.zeros(2, 4, device=DEVICE), none.long(), none)
    with pytest.raises(ValueError, match="softmax"):
        router_statistics(statistics, torch.zeros(0, 4, device=DEVICE), none.long(), none, "tanh")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("format", "blocksize"), [("nf4", 64), ("nf4", 256), ("int8", 64)])
def test_bytes_equal_the_reference_both_ways(dtype, format, blocksize):
    weights = torch.randn(2, 24, 96 if format == "int8" else 128, generator=torch.Generator().manual_seed(1))
    weights[0, 0] = 0.0  # a block of zeros
    weights[1, 1, :3] = torch.tensor([5.0, -5.0, 2.5])
    weights = weights.to(dtype).to(DEVICE)
    expected = quantization.quantize_experts(weights, format, blocksize=blocksize, backend="reference")
    packed, absmax = quantize.quantize(weights, format, blocksize)
    assert torch.equal(packed, expected.packed)
    assert torch.equal(absmax, expected.absmax)
    for target in (torch.float32, torch.float16, torch.bfloat16):
        values = quantization.dequantize_experts(expected, target, backend="reference")
        out = torch.empty_like(values)
        quantize.dequantize(packed, absmax, out, format, blocksize)
        if INTERPRETED and target == torch.bfloat16:  # the interpreter cuts the lower bits off instead of rounding
            torch.testing.assert_close(out, values, rtol=2**-7, atol=0)
        else:
            assert torch.equal(out, values)


def test_every_code_and_every_midpoint_equals_the_reference():
    """The bounds between codes are where one bit decides."""
    code = torch.tensor(quantization.NF4_CODE)
    bounds = (code[:-1] + code[1:]) / 2
    around = torch.cat([bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0)), code])
    weights = torch.ones(1, 1, 64)
    weights[0, 0, 1 : 1 + len(around)] = around
    weights = weights.to(DEVICE)
    expected = quantization.quantize_experts(weights, "nf4", backend="reference")
    assert torch.equal(quantize.quantize(weights, "nf4")[0], expected.packed)


def test_a_partial_block_is_refused():
    with pytest.raises(ValueError, match="do not divide into blocks of 64"):
        quantize.quantize(torch.ones(1, 3, 50, device=DEVICE), "nf4")


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which may be another one."""
    switched = []

    class Switch:
        def __init__(self, tensor):
            switched.append(tensor)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    weights = torch.randn(1, 2, 64, device=DEVICE)
    packed, absmax = quantize.quantize(weights, "nf4")
    monkeypatch.setattr(torch.cuda, "device_of", Switch)
    quantize.quantize(weights, "int8")
    quantize.dequantize(packed, absmax, torch.empty_like(weights), "nf4")
    scores, chosen = torch.rand(3, 4, device=DEVICE), torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    router_statistics(reference.new_statistics(4, DEVICE), scores, chosen, torch.ones(3, 1, device=DEVICE))
    assert [tensor.data_ptr() for tensor in switched] == [weights.data_ptr(), packed.data_ptr(), scores.data_ptr()]
