"""The registered operators: results, and the properties that torch relies on (opcheck, torch.compile)."""

from __future__ import annotations

import pytest
import torch

from edgefed.kernels import ops
from edgefed.kernels.masked_experts import SlotWeights, masked_experts
from edgefed.kernels.quantization import dequantize_experts, quantize_experts

HIDDEN, WIDTH, SLOTS = 64, 64, 3
FORMATS = ["nf4", "int8", "dense"]


def layer(format, dtype=torch.float32, activation="swiglu"):
    generator = torch.Generator().manual_seed(0)
    rows = 2 * WIDTH if activation in ("swiglu", "geglu") else WIDTH
    up = (torch.randn(SLOTS, rows, HIDDEN, generator=generator) * 0.1).to(dtype)
    down = (torch.randn(SLOTS, HIDDEN, WIDTH, generator=generator) * 0.1).to(dtype)
    if format == "dense":
        return (up, None, down, None, format, WIDTH, 64, dtype, activation), [
            SlotWeights(*p) for p in zip(up, down, strict=True)
        ]
    ups, downs = quantize_experts(up, format), quantize_experts(down, format)
    stored = (ups.packed, ups.absmax, downs.packed, downs.absmax, format, WIDTH, 64, dtype, activation)
    return stored, [SlotWeights(ups[i], downs[i]) for i in range(SLOTS)]


def inputs(num_tokens=5):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_tokens, HIDDEN, generator=generator).requires_grad_(),
        torch.randint(-1, SLOTS, (num_tokens, 2), generator=generator),
        torch.rand(num_tokens, 2, generator=generator).requires_grad_(),
    )


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_operator_is_the_function(format, activation):
    stored, slots = layer(format, activation=activation)
    results = []
    for function in (
        lambda *args: torch.ops.edgefed.masked_experts(*args, *stored),
        lambda *args: masked_experts(*args, slots, activation=ops.ACTIVATIONS[activation], backend="reference"),
    ):
        hidden, indices, weights = inputs()
        output = function(hidden, indices, weights)
        output.square().sum().backward()
        results.append((output.detach(), hidden.grad, weights.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format):
    stored, _ = layer(format)
    torch.library.opcheck(torch.ops.edgefed.masked_experts.default, (*inputs(), *stored))
    hidden, indices, weights = (tensor.detach() for tensor in inputs())
    arguments = (torch.ones_like(hidden), hidden, indices, weights, *stored)
    torch.library.opcheck(torch.ops.edgefed.masked_experts_backward.default, arguments)
    if format != "dense":
        arguments = (stored[0], stored[1], format, (SLOTS, 2 * WIDTH, HIDDEN), 64, torch.float32)
        torch.library.opcheck(torch.ops.edgefed.dequantize_experts.default, arguments)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(3, 8, 64), (8, 64), (2, 7, 9)])
def test_opcheck_of_quantizing(format, shape):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    torch.library.opcheck(torch.ops.edgefed.quantize_experts.default, (weights, format, 64))
    packed, absmax = torch.ops.edgefed.quantize_experts(weights, format, 64)
    expected = quantize_experts(weights, format)
    assert torch.equal(packed, expected.packed)
    assert torch.equal(absmax, expected.absmax)


def test_quantizing_and_multiplying_compile_into_one_graph():
    def function(up, down, hidden, indices, weights):
        stored = [part for stack in (up, down) for part in torch.ops.edgefed.quantize_experts(stack, "nf4", 64)]
        return torch.ops.edgefed.masked_experts(
            hidden, indices, weights, *stored, "nf4", WIDTH, 64, torch.float32, "swiglu"
        )

    (up, _, down, *_), _ = layer("dense")
    hidden, indices, weights = (tensor.detach() for tensor in inputs())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(up, down, hidden, indices, weights), function(up, down, hidden, indices, weights)
    )


def test_opcheck_of_the_statistics():
    gate = torch.softmax(torch.randn(7, 4), dim=1)
    weights, indices = gate.topk(2, dim=1)
    arguments = (torch.zeros(6, 4, dtype=torch.float64), gate, indices, weights, "probability")
    torch.library.opcheck(torch.ops.edgefed.router_statistics_.default, arguments)


def test_it_compiles_into_one_graph():
    stored, _ = layer("nf4")

    def function(hidden, indices, weights):
        return torch.ops.edgefed.masked_experts(hidden * 2, indices, weights, *stored).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for candidate in (compiled, function):
        hidden, indices, weights = inputs()
        candidate(hidden, indices, weights).sum().backward()
        results.append((hidden.grad, weights.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_no_tokens_and_no_pairs():
    stored, _ = layer("nf4")
    for hidden, indices in ((torch.zeros(0, HIDDEN), torch.zeros(0, 2, dtype=torch.int64)),
                            (torch.ones(3, HIDDEN), torch.full((3, 2), -1))):  # fmt: skip
        hidden.requires_grad_()
        output = torch.ops.edgefed.masked_experts(hidden, indices, torch.rand(indices.shape), *stored)
        output.sum().backward()
        assert output.eq(0).all()
        assert hidden.grad.eq(0).all()


def test_dequantizing_is_the_function():
    matrix = quantize_experts(torch.randn(2, 8, 64), "nf4")
    found = torch.ops.edgefed.dequantize_experts(matrix.packed, matrix.absmax, "nf4", (2, 8, 64), 64, torch.bfloat16)
    assert torch.equal(found, dequantize_experts(matrix, torch.bfloat16))


def test_trainable_weights_and_unnamed_activations_are_refused():
    stored, _ = layer("dense")
    up = stored[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="frozen"):
        torch.ops.edgefed.masked_experts(*inputs(), up, *stored[1:])
    with pytest.raises(ValueError, match="mish"):
        torch.ops.edgefed.masked_experts(*inputs(), *stored[:-1], "mish")
