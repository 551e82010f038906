"""edgefed's operations as torch operators, for torch.compile(fullgraph=True), torch.export and operator tests.

Importing this module registers them in the namespace ``edgefed``:

    masked_experts      the experts of a layer with frozen weights and a named activation
    quantize_experts    dense weights to packed ones and their scales
    dequantize_experts  packed weights to dense ones
    router_statistics_  adds to an accumulator in place

The operators are functional, so their graph cannot depend on which experts have tokens. An expert without tokens must
get no gradient instead of zeros (the optimizer then skips it); therefore `masked_experts` has gradients only for the
tokens and the gate weights. For trainable weights, Python activations, adapters, biases, several dtypes in one layer
and experts from disk, use `edgefed.kernels.masked_experts`, which torch.compile runs in Python (a graph break).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.nn import functional as F

from edgefed.kernels.masked_experts import SlotWeights, masked_experts
from edgefed.kernels.quantization import Format, QuantizedMatrix, dequantize_experts, quantize_experts
from edgefed.kernels.router_statistics import router_statistics

_library: Any = torch.library.Library("edgefed", "FRAGMENT")  # type: ignore[no-untyped-call]


def swiglu(up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * value, (P, I), of up (P, 2I)."""
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def geglu(up: torch.Tensor) -> torch.Tensor:
    """Compute gelu(gate) * value, (P, I), of up (P, 2I), with the tanh approximation of gelu."""
    gate, value = up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * value


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": swiglu,
    "geglu": geglu,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda up: F.relu(up).square(),
}
"""Name -> function of (P, 2I) for gated or (P, I) for ungated experts."""
_GATED = ("swiglu", "geglu")

_library.define(
    "masked_experts(Tensor hidden_states, Tensor slot_indices, Tensor expert_weights, Tensor up, Tensor? up_absmax, "
    "Tensor down, Tensor? down_absmax, str format, int width, int blocksize, ScalarType dtype, str activation) "
    "-> Tensor"
)
_library.define(
    "masked_experts_backward(Tensor gradient, Tensor hidden_states, Tensor slot_indices, Tensor expert_weights, "
    "Tensor up, Tensor? up_absmax, Tensor down, Tensor? down_absmax, str format, int width, int blocksize, "
    "ScalarType dtype, str activation) -> (Tensor, Tensor)"
)
_library.define("quantize_experts(Tensor weights, str format, int blocksize) -> (Tensor, Tensor)")
_library.define(
    "dequantize_experts(Tensor packed, Tensor absmax, str format, int[] shape, int blocksize, ScalarType dtype) "
    "-> Tensor"
)
_library.define(
    "router_statistics_(Tensor(a!) statistics, Tensor router, Tensor expert_indices, Tensor expert_weights, "
    "str kind) -> ()"
)


def _stack(
    packed: torch.Tensor,
    absmax: torch.Tensor | None,
    format: Literal["dense"] | Format,
    rows: int,
    columns: int,
    blocksize: int,
    dtype: torch.dtype,
) -> Sequence[torch.Tensor | QuantizedMatrix]:
    """Return the matrices of a stack by slot: rows of a dense (S, rows, columns), or quantized."""
    if format == "dense":
        return list(packed.unbind(0))
    shape = (packed.shape[0], rows, columns)
    stack = QuantizedMatrix(format, packed, absmax, shape, blocksize if format == "nf4" else columns, dtype)
    return [stack[slot] for slot in range(len(stack))]


def _slots(
    hidden: torch.Tensor,
    up: torch.Tensor,
    up_absmax: torch.Tensor | None,
    down: torch.Tensor,
    down_absmax: torch.Tensor | None,
    format: Literal["dense"] | Format,
    width: int,
    blocksize: int,
    dtype: torch.dtype,
    activation: str,
) -> list[SlotWeights]:
    hidden_size = hidden.shape[1]
    rows = 2 * width if activation in _GATED else width
    ups = _stack(up, up_absmax, format, rows, hidden_size, blocksize, dtype)
    downs = _stack(down, down_absmax, format, hidden_size, width, blocksize, dtype)
    return [SlotWeights(up=up, down=down) for up, down in zip(ups, downs, strict=True)]


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if name not in ACTIVATIONS:
        raise ValueError(f"invalid activation {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _masked_experts(hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *stored: Any) -> torch.Tensor:
    with torch.no_grad():
        return masked_experts(
            hidden, indices, weights, _slots(hidden, *stored), activation=_activation(stored[-1]),
            int8_activations=False,
        )  # fmt: skip


def _masked_experts_backward(
    gradient: torch.Tensor, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *stored: Any
) -> tuple[torch.Tensor, ...]:
    with torch.enable_grad():
        leaves = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
        detached: list[Any] = [value.detach() if isinstance(value, torch.Tensor) else value for value in stored]
        slots = _slots(hidden, *detached)
        output = masked_experts(leaves[0], indices, leaves[1], slots, activation=_activation(stored[-1]))
    if not output.requires_grad:  # no pairs
        return torch.zeros_like(hidden), torch.zeros_like(weights)
    return torch.autograd.grad(output, leaves, gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    hidden, indices, weights, up, up_absmax, down, down_absmax, *facts = inputs
    if up.requires_grad or down.requires_grad:
        raise ValueError("torch.ops.edgefed.masked_experts needs frozen weights; use edgefed.kernels.masked_experts")
    ctx.save_for_backward(hidden, indices, weights, up, up_absmax, down, down_absmax)
    ctx.facts = facts


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    d_hidden, d_weights = torch.ops.edgefed.masked_experts_backward(gradient, *ctx.saved_tensors, *ctx.facts)
    return d_hidden, None, d_weights, *([None] * 9)


def _quantize(weights: torch.Tensor, format: Format, blocksize: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    matrix = quantize_experts(weights, format, blocksize=blocksize)
    return matrix.packed, matrix.absmax


def _quantized_shapes(weights: torch.Tensor, format: Format, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    *experts, rows, columns = weights.shape
    if format == "int8":
        absmax = weights.new_empty((*experts, rows), dtype=torch.float32)
        return weights.new_empty(weights.shape, dtype=torch.int8), absmax
    size = rows * columns
    return (
        weights.new_empty((*experts, (size + 1) // 2), dtype=torch.uint8),
        weights.new_empty((*experts, -(-size // blocksize)), dtype=torch.float32),
    )


def _dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, format: Format, shape: list[int], blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    return dequantize_experts(QuantizedMatrix(format, packed, absmax, tuple(shape), blocksize, dtype))


def _router_statistics(
    statistics: torch.Tensor, router: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, kind: str
) -> None:
    router_statistics(statistics, router, indices, weights, kind=kind)


_EVERYWHERE = "CompositeExplicitAutograd"
_library.impl("masked_experts", _masked_experts, _EVERYWHERE)
_library.impl("masked_experts_backward", _masked_experts_backward, _EVERYWHERE)
_library.impl("quantize_experts", _quantize, _EVERYWHERE)
_library.impl("dequantize_experts", _dequantize, _EVERYWHERE)
_library.impl("router_statistics_", _router_statistics, _EVERYWHERE)
torch.library.register_fake(
    "edgefed::masked_experts", lambda hidden, *_: torch.empty_like(hidden).contiguous(), lib=_library
)
torch.library.register_fake(
    "edgefed::masked_experts_backward",
    lambda gradient, hidden, indices, weights, *_: (torch.empty_like(hidden), torch.empty_like(weights)),
    lib=_library,
)
torch.library.register_fake("edgefed::quantize_experts", _quantized_shapes, lib=_library)
torch.library.register_fake(
    "edgefed::dequantize_experts",
    lambda packed, absmax, format, shape, blocksize, dtype: packed.new_empty(shape, dtype=dtype),
    lib=_library,
)
torch.library.register_fake("edgefed::router_statistics_", lambda *_: None, lib=_library)
torch.library.register_autograd("edgefed::masked_experts", _backward, setup_context=_setup_context, lib=_library)
