"""CUDA quantization, byte for byte the reference's, and CUDA router statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.kernels.router_statistics import GATE_KINDS, gate_of, new_statistics, router_statistics

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def weights_of(shape, dtype, seed=0):
    stack = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(0.1)
    stack[0, 0] = 0.0
    return stack.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("format", "shape", "blocksize"),
    [("nf4", (3, 16, 64), 64), ("nf4", (2, 7, 9), 64), ("nf4", (1, 5, 100), 32), ("nf4", (1, 4, 1100), 4096),
     ("int8", (3, 16, 64), 64), ("int8", (2, 7, 9), 64)],
)  # fmt: skip
def test_quantized_bytes_and_values_are_those_of_the_reference(rig, format, shape, blocksize, dtype):
    stack = weights_of(shape, dtype)
    expected = quantize_experts(stack, format, blocksize=blocksize, backend="reference")
    packed, absmax = rig.kernels.quantize(stack.to(rig.device), format, blocksize)
    assert torch.equal(packed.cpu(), expected.packed)
    assert torch.equal(absmax.cpu(), expected.absmax)
    for target in FLOATS:
        out = torch.full(shape, float("nan"), dtype=target, device=rig.device)
        rig.kernels.dequantize(packed, absmax, format, blocksize, out)
        assert torch.equal(out.cpu(), dequantize_experts(expected, target, backend="reference"))
    one = torch.empty(shape[1:], dtype=dtype, device=rig.device)
    rig.kernels.dequantize(packed[-1], absmax[-1], format, blocksize, one)
    assert torch.equal(one.cpu(), dequantize_experts(expected[shape[0] - 1], dtype, backend="reference"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantizing_refuses_weights_that_are_not_finite(rig, format, value):
    stack = weights_of((2, 8, 64), torch.float32)
    stack[1, 3, 5] = value
    with pytest.raises(ValueError, match="infinite"):
        rig.kernels.quantize(stack.to(rig.device), format, 64)


def test_int8_refuses_weights_beyond_float16(rig):
    stack = weights_of((2, 8, 64), torch.float32)
    stack[1, 3, 5] = 7e4
    with pytest.raises(ValueError, match="row 3 of expert 1"):
        rig.kernels.quantize(stack.to(rig.device), "int8", 64)


def batch(tokens, experts, top_k, seed, gate_dtype, weight_dtype):
    generator = torch.Generator().manual_seed(seed)
    gate = torch.softmax(3 * torch.randn(tokens, experts, generator=generator), dim=1)
    weights, indices = gate.topk(top_k, dim=1)
    return gate.to(gate_dtype), indices, (2.5 * weights).to(weight_dtype)


@pytest.mark.parametrize("gate_dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("sizes", "experts", "top_k"), [([5], 4, 2), ([40, 1, 90], 64, 8), ([0, 17], 130, 3), ([50], 16, 16)]
)
def test_statistics_equal_the_reference(rig, sizes, experts, top_k, gate_dtype, weight_dtype):
    attention = len(sizes) > 1
    ours, expected = (
        new_statistics(experts, rig.device, attention=attention),
        new_statistics(experts, attention=attention),
    )
    for seed, size in enumerate(sizes):
        gate, indices, weights = batch(size, experts, top_k, seed, gate_dtype, weight_dtype)
        received = torch.rand(size, generator=torch.Generator().manual_seed(seed)) if attention else None
        router_statistics(expected, gate.float(), indices, weights.float(), received=received, backend="reference")
        own = received.to(rig.device, weight_dtype) if attention else None
        rig.kernels.router_statistics(ours, *(t.to(rig.device) for t in (gate, indices, weights)), received=own)
    np.testing.assert_allclose(ours[:6].cpu().numpy(), expected[:6].numpy(), rtol=2e-6, atol=1e-6)
    rtol = 2e-6 if weight_dtype == torch.float32 else 5e-3
    np.testing.assert_allclose(ours[6:].cpu().numpy(), expected[6:].numpy(), rtol=rtol, atol=1e-6)
    assert torch.equal(ours[0].cpu(), expected[0])  # counts are exact


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("tokens", "experts"), [(50, 64), (3, 130), (1, 1)])
def test_statistics_from_logits(rig, kind, dtype, tokens, experts):
    generator = torch.Generator().manual_seed(4)
    logits = (4 * torch.randn(tokens, experts, generator=generator)).to(dtype)
    weights, indices = gate_of(logits, kind).topk(1, dim=1)
    ours, expected = new_statistics(experts, rig.device), new_statistics(experts)
    router_statistics(expected, gate_of(logits.double(), kind), indices, weights, backend="reference")
    arguments = (t.to(rig.device) for t in (logits, indices, weights))
    rig.kernels.router_statistics(ours, *arguments, GATE_KINDS.index(kind))
    np.testing.assert_allclose(ours.cpu().numpy(), expected.numpy(), rtol=5e-6, atol=5e-6)


def test_statistics_of_gates_0_and_1_and_small_ones(rig):
    gate = torch.tensor([[0.0, 1.0, 1e-9], [1e-9, 1.0000001, 0.0]], device=rig.device)
    statistics = new_statistics(3, rig.device)
    indices = torch.tensor([[1], [1]], device=rig.device)
    rig.kernels.router_statistics(statistics, gate, indices, torch.ones(2, 1, device=rig.device))
    assert torch.isfinite(statistics).all()
    assert statistics[4, 0].item() == pytest.approx(-1e-9)
    assert statistics[4, 1].item() == 0.0


def test_statistics_have_the_same_bits_in_every_order(rig):
    results = []
    for falling in (False, True):
        if rig.emulated:
            rig.pretend(falling=falling)
        statistics = new_statistics(64, rig.device)
        rig.kernels.router_statistics(
            statistics, *(t.to(rig.device) for t in batch(200, 64, 8, 3, torch.float32, torch.float32))
        )
        results.append(statistics.cpu())
    assert torch.equal(*results)


def test_an_expert_out_of_range_aborts_the_device(rig):
    if not rig.emulated:
        pytest.skip("a stopped GPU serves no further test in this process")
    for index in (-1, 2):
        with pytest.raises(RuntimeError, match="CUDA error 719"):
            rig.kernels.router_statistics(
                new_statistics(2), torch.rand(1, 2), torch.tensor([[index]]), torch.ones(1, 1)
            )
