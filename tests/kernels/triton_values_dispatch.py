"""The Triton backend of each operation, requested by name. Run by test_triton_values.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgefed.errors import ConfigError
from edgefed.kernels import dispatch
from edgefed.kernels.masked_experts import SlotWeights, masked_experts
from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.kernels.router_statistics import GATE_KINDS, gate_of, new_statistics, router_statistics
from edgefed.triton_kernels.tensor_types import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def announced(monkeypatch):
    """In the interpreter, "triton" is a backend for the CPU."""
    with dispatch.temporary_backends():
        monkeypatch.delenv("EDGEFED_KERNELS", raising=False)
        for operation in dispatch.OPERATIONS:
            dispatch.register_backend(operation, "triton", DEVICE, lambda device: None, before="native")
        yield


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 64), (16, 64), (2, 0, 64)])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantizing_gives_the_bytes_of_the_reference(format, shape, nested):
    nested = nested and format == "nf4"
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = quantize_experts(weights, format, nested=nested, backend="reference")
    found = quantize_experts(weights.to(DEVICE), format, nested=nested, backend="triton")
    assert torch.equal(found.packed.cpu(), expected.packed)
    torch.testing.assert_close(found.scales().cpu(), expected.scales(), rtol=0, atol=1e-6 if nested else 0)
    values = dequantize_experts(found, backend="triton")
    assert torch.equal(values, dequantize_experts(found, backend="reference"))


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_weights_are_refused(format, value):
    weights = torch.ones(2, 8, 64, device=DEVICE)
    weights[1, 2, 3] = value
    with pytest.raises(ValueError, match="NaN"):
        quantize_experts(weights, format, backend="triton")


def test_only_int8_refuses_weights_beyond_float16():
    weights = torch.full((1, 2, 64), 7e4, device=DEVICE)
    with pytest.raises(ValueError, match="too large for float16"):
        quantize_experts(weights, "int8", backend="triton")
    assert dequantize_experts(quantize_experts(weights, "nf4", backend="triton"), backend="triton").eq(7e4).all()


def test_a_partial_block_is_an_error_by_name_and_falls_back_with_auto(caplog):
    weights = torch.randn(2, 7, 9, device=DEVICE)
    with pytest.raises(ConfigError, match="does not divide into blocks of 64"):
        quantize_experts(weights, "nf4", backend="triton")
    with caplog.at_level("INFO"):
        matrix = quantize_experts(weights, "nf4")
    assert "not triton: an expert of 63 weights does not divide into blocks" in caplog.text
    with pytest.raises(ConfigError, match="does not divide into blocks of 64"):
        dequantize_experts(matrix, backend="triton")
    assert torch.equal(dequantize_experts(matrix), dequantize_experts(matrix, backend="reference"))


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_statistics_are_those_of_the_reference(kind):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 16, generator=generator)
    router = gate_of(logits, "softmax") if kind == "probability" else logits
    weights, indices = gate_of(logits, "softmax").topk(3, dim=1)
    expected, wide = new_statistics(16), new_statistics(32).to(DEVICE)
    found = wide[:, ::2]  # not contiguous
    for _ in range(2):
        router_statistics(expected, router, indices, weights, kind=kind, backend="reference")
        arguments = (t.to(DEVICE) for t in (router, indices, weights))
        router_statistics(found, *arguments, kind=kind, backend="triton")
    np.testing.assert_allclose(found.cpu().numpy(), expected.numpy(), rtol=5e-6, atol=5e-6)
    assert wide[:, 1::2].eq(0).all()


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


@pytest.mark.parametrize("finish", [None, lambda rows: torch.tanh(rows) * 2 + 0.5])
def test_a_layer_is_that_of_the_reference(finish):
    results = []
    for backend in ("triton", "reference"):
        generator = torch.Generator().manual_seed(0)
        stacks = torch.randn(2, 128, 64, generator=generator) * 0.1, torch.randn(2, 64, 64, generator=generator) * 0.1
        dense = SlotWeights(*(stack[0].clone().to(DEVICE).requires_grad_() for stack in stacks))
        frozen = SlotWeights(*(quantize_experts(stack[1], "nf4").to(DEVICE) for stack in stacks))
        hidden = torch.randn(20, 64, generator=generator).to(DEVICE).requires_grad_()
        indices = torch.randint(-1, 2, (20, 3), generator=generator).to(DEVICE)
        indices[0] = 1  # merged experts: one slot, their weights added
        weights = torch.rand(20, 3, generator=generator).to(DEVICE)
        weights[indices < 0] = float("nan")  # weights of dropped pairs are not read
        weights.requires_grad_()
        output = masked_experts(
            hidden, indices, weights, [dense, frozen], activation=swiglu, finish=finish, backend=backend
        )
        output.square().sum().backward()
        results.append([output.detach(), hidden.grad, weights.grad[indices >= 0], dense.up.grad, dense.down.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


ENERGY_LAYERS = {
    "every format": dict(storages=("dense", "nf4", "int8", "nf4 nested", "dense"), hidden=64, width=64),
    "half precision": dict(storages=("nf4", "dense", "int8"), hidden=64, width=64, dtype=torch.bfloat16),
    "transposed": dict(storages=("dense", "nf4", "int8"), hidden=128, width=64, transposed=True, activation=F.relu),
    "with a norm": dict(storages=("nf4", "dense"), hidden=64, width=64, finish=lambda rows: F.rms_norm(rows, (64,))),
    "no multiple of a tile": dict(storages=("dense", "int8", "dense"), hidden=40, width=72, tokens=70),
    "one expert, one token": dict(storages=("nf4",), hidden=64, width=64, tokens=1),
}


def energy_slot(storage, up_rows, width, hidden, dtype, transposed, generator) -> SlotWeights:
    def matrix(*shape):
        value = (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(dtype)
        value = value.t().contiguous() if transposed else value
        kind, _, nested = storage.partition(" ")
        return value.to(DEVICE) if kind == "dense" else quantize_experts(value, kind, nested=bool(nested)).to(DEVICE)

    return SlotWeights(matrix(up_rows, hidden), matrix(hidden, width))


@pytest.mark.parametrize("layer", ENERGY_LAYERS)
def test_neuron_energies_are_those_of_the_reference(layer):
    form = ENERGY_LAYERS[layer]
    num_tokens = form.get("tokens", 20)
    storages, width, hidden = form["storages"], form["width"], form["hidden"]
    dtype, activation = form.get("dtype", torch.float32), form.get("activation", swiglu)
    generator = torch.Generator().manual_seed(0)
    up_rows = 2 * width if activation is swiglu else width
    transposed = form.get("transposed", False)
    slots = [energy_slot(storage, up_rows, width, hidden, dtype, transposed, generator) for storage in storages]
    num_slots = len(slots)
    indices = torch.randint(-1, max(1, num_slots - 1), (num_tokens, 2), generator=generator).to(DEVICE)
    indices[0] = 0  # and no token for the last slot of several
    x = torch.randn(num_tokens, hidden, generator=generator).to(DEVICE, dtype)
    weights = torch.rand(num_tokens, 2, generator=generator).to(DEVICE)
    weights[indices < 0] = float("nan")
    options = dict(activation=activation, is_transposed=transposed, finish=form.get("finish"))
    energies, expected = (torch.zeros(num_slots, width, device=DEVICE) for _ in range(2))

    def add(to, backend):
        with torch.no_grad():
            masked_experts(x, indices, weights, slots, backend=backend, neuron_energy=to.unbind(0), **options)

    add(expected, "reference")
    add(energies, "triton")
    once = energies.clone()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(once, expected, rtol=tolerance, atol=tolerance * float(expected.max()) / 10)
    assert expected.max() > 0
    assert num_slots == 1 or once[-1].eq(0).all()
    add(energies, "triton")
    assert torch.equal(energies, 2 * once), "energies accumulate, with the same bits from run to run"


def test_energies_may_be_anywhere_and_their_shapes_are_checked():
    generator = torch.Generator().manual_seed(0)
    slots = [energy_slot("nf4", 128, 64, 64, torch.float32, False, generator) for _ in range(2)]
    x, weights = torch.randn(5, 64, generator=generator).to(DEVICE), torch.ones(5, 2, device=DEVICE)
    indices = torch.tensor([[0, 1]] * 5, device=DEVICE)

    def run(energies, backend="triton"):
        with torch.no_grad():
            masked_experts(x, indices, weights, slots, activation=swiglu, backend=backend, neuron_energy=energies)
        return energies

    apart = [torch.zeros(64, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    expected = run([torch.zeros(64, dtype=torch.float64, device=DEVICE) for _ in range(2)], "reference")
    for one, other in zip(run(apart), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"expected 2 accumulators of shape \(64,\), found 1"):
        run(apart[:1])
    with pytest.raises(ConfigError, match="energies must be contiguous, in float32 or float64"):
        run(list(torch.zeros(64, 2, device=DEVICE).unbind(1)))
