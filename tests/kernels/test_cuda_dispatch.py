"""The CUDA backend of each operation, requested by name, compared with the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgefed.errors import ConfigError
from edgefed.kernels import cuda_experts, cuda_kernels, dispatch
from edgefed.kernels.masked_experts import SlotWeights, masked_experts
from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.kernels.router_statistics import GATE_KINDS, gate_of, new_statistics, router_statistics


@pytest.fixture(autouse=True)
def announced(rig, monkeypatch):
    """On the emulator, "cuda" is a backend for the CPU."""
    with dispatch.temporary_backends():
        monkeypatch.delenv("EDGEFED_KERNELS", raising=False)
        for module in (cuda_kernels, cuda_experts):
            monkeypatch.setattr(module, "cuda_kernels", lambda: rig.kernels)
        for operation in dispatch.OPERATIONS:
            device = rig.device.type
            dispatch.register_backend(operation, "cuda", device, lambda device: None, before="native")
        yield


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 64), (16, 64), (2, 7, 9), (7, 9), (2, 0, 64)])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantizing_gives_the_bytes_of_the_reference(rig, format, shape, nested):
    if nested and format == "int8":
        nested = False
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = quantize_experts(weights, format, nested=nested, backend="reference")
    found = quantize_experts(weights.to(rig.device), format, nested=nested, backend="cuda")
    assert torch.equal(found.packed.cpu(), expected.packed)
    torch.testing.assert_close(found.scales().cpu(), expected.scales(), rtol=0, atol=1e-6 if nested else 0)
    for dtype in (torch.float32, torch.bfloat16):
        values = dequantize_experts(found, dtype, backend="cuda")
        assert torch.equal(values, dequantize_experts(found, dtype, backend="reference"))


def test_nan_weights_are_refused(rig):
    weights = torch.ones(2, 8, 64, device=rig.device)
    weights[1, 2, 3] = float("nan")
    for format in ("nf4", "int8"):
        with pytest.raises(ValueError, match="NaN"):
            quantize_experts(weights, format, backend="cuda")


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_statistics_are_those_of_the_reference(rig, kind):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 16, generator=generator)
    router = gate_of(logits, "softmax") if kind == "probability" else logits
    weights, indices = gate_of(logits, "softmax").topk(3, dim=1)
    expected, wide = new_statistics(16), new_statistics(32).to(rig.device)
    found = wide[:, ::2]  # not contiguous
    for _ in range(2):
        router_statistics(expected, router, indices, weights, kind=kind, backend="reference")
        arguments = (t.to(rig.device) for t in (router, indices, weights))
        router_statistics(found, *arguments, kind=kind, backend="cuda")
    np.testing.assert_allclose(found.cpu().numpy(), expected.numpy(), rtol=5e-6, atol=5e-6)
    assert wide[:, 1::2].eq(0).all()


def test_statistics_without_a_kernel_fall_back(rig, caplog):
    gate = torch.full((2, 4), 0.25, dtype=torch.float64, device=rig.device)
    indices, weights = torch.tensor([[0], [3]], device=rig.device), torch.ones(2, 1, device=rig.device)
    with pytest.raises(ConfigError, match="router's output in torch.float64"):
        router_statistics(new_statistics(4, rig.device), gate, indices, weights, backend="cuda")
    statistics = new_statistics(4, rig.device)
    with caplog.at_level("INFO"):
        router_statistics(statistics, gate, indices, weights)
    assert statistics[0].tolist() == [1, 0, 0, 1]
    assert "not cuda: no kernel for the router's output in torch.float64" in caplog.text


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def finish(rows: torch.Tensor) -> torch.Tensor:
    return torch.tanh(rows) * 2 + 0.5  # not linear, not 0 at 0


@pytest.mark.parametrize("operation", [None, finish])
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_layer_is_that_of_the_reference(rig, tokens, operation):
    results = []
    for backend in ("cuda", "reference"):
        generator = torch.Generator().manual_seed(0)
        stacks = torch.randn(2, 64, 64, generator=generator) * 0.1, torch.randn(2, 64, 32, generator=generator) * 0.1
        dense = SlotWeights(*(stack[0].clone().to(rig.device).requires_grad_() for stack in stacks))
        frozen = SlotWeights(*(quantize_experts(stack[1], "nf4").to(rig.device) for stack in stacks))
        hidden = torch.randn(tokens, 64, generator=generator).to(rig.device).requires_grad_()
        indices = torch.randint(-1, 2, (tokens, 3), generator=generator).to(rig.device)
        indices[0] = 1  # merged experts: one slot, their weights added
        weights = torch.rand(tokens, 3, generator=generator).to(rig.device)
        weights[indices < 0] = float("nan")
        weights.requires_grad_()
        output = masked_experts(
            hidden, indices, weights, [dense, frozen], activation=swiglu, finish=operation, backend=backend
        )
        output.square().sum().backward()
        results.append([output.detach(), hidden.grad, weights.grad[indices >= 0], dense.up.grad, dense.down.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_auto_uses_it_and_falls_back_where_it_has_no_kernel(rig, monkeypatch, caplog, tmp_path):
    """With one slot in float32 and one in float16, for which Triton has kernels and CUDA has not."""
    calls = []
    sort_pairs = rig.kernels.sort_pairs
    monkeypatch.setattr(rig.kernels, "sort_pairs", lambda *given: calls.append("cuda") or sort_pairs(*given))
    one, other = torch.randn(2, 64, 64, device=rig.device), torch.randn(2, 64, 32, device=rig.device)
    hidden, indices = torch.randn(2, 64, device=rig.device), torch.tensor([[0], [1]], device=rig.device)
    slots = [SlotWeights(one[0], other[0]), SlotWeights(one[1], other[1])]
    masked_experts(hidden, indices, torch.ones(2, 1, device=rig.device), slots, activation=swiglu)
    assert calls == ["cuda"]
    slots[1] = SlotWeights(one[1].half(), other[1].half())
    with caplog.at_level("INFO"):
        masked_experts(hidden, indices, torch.ones(2, 1, device=rig.device), slots, activation=swiglu)
    assert calls == ["cuda"]
    assert "not cuda: slots differ in dtype" in caplog.text
