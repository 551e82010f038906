"""Masked experts on the CPU by the native library: `edgefed.kernels.masked_experts` with the same results, faster.

Pairs are sorted by slot and dropped ones removed; then each projection is one call for all experts, in which each
expert's matrix is read once, packed or not, and meets its rows of x (`edgefed.kernels.native_products`).

The backward pass saves tokens, indices, gate weights and the weights as they are stored. It computes the up projection
again (a third of the forward's arithmetic) unless it is asked to keep it, and decodes quantised weights again. With
G = dy[token] and D = G W_down of a pair: d weight = D . act, d act = weight D, so the expert's output is not needed.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from edgefed.kernels.native_products import (
    Matrix,
    combine,
    grouped_product,
    outer,
    sort_pairs,
    swiglu,
    swiglu_backward,
)
from edgefed.kernels.quantization import QuantizedMatrix
from edgefed.native import DTYPE_CODES

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATED_ROWS = 256
"""Pairs whose activation is computed at a time where it is torch's: what it needs on the way does not grow with all."""


class Unsupported(Exception):
    """Found after the experts were read: this layer is left to the reference. The message is the reason."""


def why_not(hidden_states: torch.Tensor, expert_weights: torch.Tensor, slots: object) -> str | None:
    """Why this layer is left to the reference, or None."""
    if hidden_states.dtype not in _DTYPES:
        return f"it has no kernel for {hidden_states.dtype}"
    if (
        getattr(slots, "streamed", False)
        and torch.is_grad_enabled()
        and (hidden_states.requires_grad or expert_weights.requires_grad)
    ):
        return "streamed experts are not kept for a backward pass"
    return None


# --- what one call is made of -----------------------------------------------------------------------------------


class Projection(NamedTuple):
    """One of the two matrices of an expert, with its bias and its adapter (A, B, scale), as indices; -1 is none."""

    matrix: Matrix
    bias: int
    lora: tuple[int, int, float] | None


class Expert(NamedTuple):
    """One slot that has tokens: the sorted pairs begin .. end."""

    up: Projection
    down: Projection
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything about a call that is no tensor."""

    experts: tuple[Expert, ...]
    activation: Callable[[torch.Tensor], torch.Tensor]
    is_transposed: bool
    int8: bool
    keep_activations: bool
    is_swiglu: bool


_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def is_swiglu(activation: Callable[[torch.Tensor], torch.Tensor], columns: int) -> bool:
    """Whether ``activation`` maps (P, columns) to silu(first half) * second half: found out by running it, once.

    The numbers that it is tried on are also large, so that one that clamps is not mistaken.
    """
    if columns % 2:
        return False
    owner = getattr(activation, "__self__", activation)
    try:
        known = _known.setdefault(owner, {})
    except TypeError:  # what cannot be remembered is not asked
        return False
    key = (getattr(activation, "__name__", ""), columns)
    if key not in known:
        generator = torch.Generator().manual_seed(0)
        scale = torch.tensor([[1.0], [30.0], [1000.0]])
        probe = torch.randn(3, columns, generator=generator) * scale
        with torch.no_grad():
            found = activation(probe)
        gate, value = probe.chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * value
        known[key] = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    return known[key]


class _Tensors:
    """Collects the tensors of a call."""

    def __init__(self) -> None:
        self.all: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return -1
        self.all.append(tensor)
        return len(self.all) - 1

    def projection(self, weight: torch.Tensor | QuantizedMatrix, bias: torch.Tensor | None, lora) -> Projection:
        if isinstance(weight, QuantizedMatrix):
            matrix = Matrix(
                self.add(weight.packed), self.add(weight.scales()), DTYPE_CODES[weight.format], weight.shape,
                weight.blocksize, weight.dtype,
            )  # fmt: skip
        else:
            code = DTYPE_CODES.get(str(weight.dtype).removeprefix("torch."), -1)
            matrix = Matrix(self.add(weight), -1, code, tuple(weight.shape), 0, weight.dtype)
        adapter = None if lora is None else (self.add(lora.lora_a), self.add(lora.lora_b), lora.scale)
        return Projection(matrix, self.add(bias), adapter)


# --- forward ----------------------------------------------------------------------------------------------------


def runs_of(experts: tuple[Expert, ...]) -> list[list[Expert]]:
    """Experts cut where the dtype of their weights changes: each run is computed in one dtype."""
    runs: list[list[Expert]] = []
    for expert in experts:
        if not runs or runs[-1][-1].up.matrix.dtype != expert.up.matrix.dtype:
            runs.append([])
        runs[-1].append(expert)
    return runs


def project(
    call: Call, run: list[Expert], name: str, tensors: list, x: torch.Tensor, x_rows: torch.Tensor | None, int8: bool
) -> torch.Tensor:
    """The ``name`` ("up" or "down") projection of a run, (P, out): with biases and adapters."""
    first, count = run[0].begin, run[-1].end - run[0].begin
    projections = [(getattr(expert, name), expert.begin - first, expert.end - first) for expert in run]
    entries = [(projection.matrix, begin, end) for projection, begin, end in projections]
    out = grouped_product(entries, tensors, x, x_rows, count, call.is_transposed, int8)
    for projection, begin, end in projections:
        if projection.bias >= 0:
            out[begin:end] += tensors[projection.bias]
        if projection.lora is not None:
            a, b, scale = projection.lora
            rows = x[begin:end] if x_rows is None else x[x_rows[begin:end]]
            low = torch.mm(rows, tensors[a].to(x.dtype).t())  # (p, R)
            out[begin:end].addmm_(low, tensors[b].to(x.dtype).t(), alpha=scale)
    return out


def forward(
    call: Call, hidden: torch.Tensor, tokens: torch.Tensor, tensors: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs of all sorted pairs, (P, H), and the up projection of each run."""
    outputs, kept = [], []
    for run in runs_of(call.experts):
        x = hidden.to(run[0].up.matrix.dtype).contiguous()
        up = project(call, run, "up", tensors, x, tokens[run[0].begin : run[-1].end], call.int8)
        act = swiglu(up) if call.is_swiglu else torch.cat([call.activation(part) for part in up.split(ACTIVATED_ROWS)])
        outputs.append(project(call, run, "down", tensors, act, None, call.int8))
        if call.keep_activations:
            kept.append(up)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), kept


# --- backward ---------------------------------------------------------------------------------------------------


def _activation_backward(
    call: Call, up: torch.Tensor, d: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `swiglu_backward`, for an activation that only torch knows."""
    act, d_up, d_weights = torch.empty_like(d), torch.empty_like(up), torch.empty_like(weights)
    for begin in range(0, up.shape[0], ACTIVATED_ROWS):
        rows = slice(begin, begin + ACTIVATED_ROWS)
        with torch.enable_grad():
            source = up[rows].detach().requires_grad_()
            part = call.activation(source)
        d_up[rows] = torch.autograd.grad(part, source, d[rows] * weights[rows].unsqueeze(1).to(d.dtype))[0]
        act[rows] = part.detach()
        d_weights[rows] = torch.linalg.vecdot(d[rows].float(), act[rows].float())
    return act, d_up, d_weights


class _Gradients:
    """Gradients by index of the tensor in the call."""

    def __init__(self, tensors: list[torch.Tensor], needed: tuple[bool, ...]):
        self.tensors, self.needed = tensors, needed
        self.of: list[torch.Tensor | None] = [None] * len(tensors)

    def wants(self, index: int) -> bool:
        return index >= 0 and self.needed[index]

    def set(self, index: int, value: torch.Tensor) -> None:
        value = value.to(self.tensors[index].dtype)
        self.of[index] = value if self.of[index] is None else self.of[index] + value

    def projection(
        self,
        projection: Projection,
        dy: torch.Tensor,  # (p, out)
        x: torch.Tensor,
        x_rows: torch.Tensor | None,
        is_transposed: bool,
    ) -> None:
        """Gradients of one projection's weight, bias and adapter. x (p, in) or x[x_rows]."""
        if self.wants(projection.matrix.data):
            if is_transposed:
                rows = (x if x_rows is None else x[x_rows]).contiguous()
                gradient = outer(rows, dy, None)
            else:
                gradient = outer(dy, x, x_rows)
            self.set(projection.matrix.data, gradient)
        if self.wants(projection.bias):
            self.set(projection.bias, dy.sum(0, dtype=torch.float32))
        if projection.lora is None:
            return
        a, b, scale = projection.lora
        if self.wants(a) or self.wants(b):
            rows = x if x_rows is None else x[x_rows]
            if self.wants(b):
                low = torch.mm(rows, self.tensors[a].to(x.dtype).t())
                self.set(b, torch.mm(dy.t(), low) * scale)
            if self.wants(a):
                d_low = torch.mm(dy, self.tensors[b].to(x.dtype))
                self.set(a, torch.mm(d_low.t(), rows) * scale)


def back_project(
    call: Call, run: list[Expert], name: str, tensors: list, dy: torch.Tensor, dy_rows: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of a projection's input, (P, in), for dy (P, out) or dy[dy_rows]."""
    first, count = run[0].begin, run[-1].end - run[0].begin
    projections = [(getattr(expert, name), expert.begin - first, expert.end - first) for expert in run]
    entries = [(projection.matrix, begin, end) for projection, begin, end in projections]
    out = grouped_product(entries, tensors, dy, dy_rows, count, not call.is_transposed, False)
    for projection, begin, end in projections:
        if projection.lora is not None:
            a, b, scale = projection.lora
            rows = dy[begin:end] if dy_rows is None else dy[dy_rows[begin:end]]
            low = torch.mm(rows, tensors[b].to(dy.dtype))  # (p, R)
            out[begin:end].addmm_(low, tensors[a].to(dy.dtype), alpha=scale)
    return out


def backward(
    call: Call,
    dy: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    place: torch.Tensor,
    tensors: list[torch.Tensor],
    kept: list[torch.Tensor],
    needed: tuple[bool, ...],
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of hidden (T, H), weights (T, K) and the tensors; ``needed`` says which, in that order."""
    needs_hidden, needs_weights, *rest = needed
    gradients = _Gradients(tensors, tuple(rest))
    tokens = order // weights.shape[1]
    factors = weights.reshape(-1)[order].float()  # (P,)
    d_factors = torch.empty_like(factors)
    d_inputs = []
    for number, run in enumerate(runs_of(call.experts)):
        first, last = run[0].begin, run[-1].end
        dtype = run[0].up.matrix.dtype
        x, g = hidden.to(dtype).contiguous(), dy.to(dtype).contiguous()
        rows, factor = tokens[first:last], factors[first:last]
        d_out = back_project(call, run, "down", tensors, g, rows)  # D (p, I)
        up = kept[number] if kept else project(call, run, "up", tensors, x, rows, False)
        if call.is_swiglu:
            act, d_up, d_factors[first:last] = swiglu_backward(up, d_out, factor)
        else:
            act, d_up, d_factors[first:last] = _activation_backward(call, up, d_out, factor)
        del d_out, up
        for expert in run:
            begin, end = expert.begin - first, expert.end - first
            down = expert.down
            own = rows[begin:end]
            if needs_weights and down.bias >= 0:
                d_factors[expert.begin : expert.end] += g[own].float() @ tensors[down.bias].float()
            learns = [down.matrix.data, down.bias, *(down.lora[:2] if down.lora else ())]
            if any(gradients.wants(index) for index in learns):
                weighted = g[own] * factor[begin:end].unsqueeze(1).to(dtype)
                gradients.projection(down, weighted, act[begin:end], None, call.is_transposed)
                del weighted
            gradients.projection(expert.up, d_up[begin:end], x, own, call.is_transposed)
        del act  # the weights' gradients needed it; what comes now is as large
        if needs_hidden:
            d_inputs.append(back_project(call, run, "up", tensors, d_up, None))
        del d_up
    d_hidden = d_weights = None
    if needs_hidden:
        d_hidden = combine(d_inputs[0] if len(d_inputs) == 1 else torch.cat(d_inputs), place, None, hidden.dtype)
    if needs_weights:
        d_weights = torch.zeros_like(weights)
        d_weights.view(-1)[order] = d_factors.to(weights.dtype)
    return d_hidden, d_weights, gradients.of


class _MaskedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, hidden, weights, order, place, *tensors):
        rows, kept = forward(call, hidden, order // weights.shape[1], list(tensors))
        ctx.call = call
        ctx.num_tensors = len(tensors)
        ctx.save_for_backward(hidden, weights, order, place, *tensors, *kept)
        return combine(rows, place, weights, hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        hidden, weights, order, place, *others = ctx.saved_tensors
        tensors, kept = others[: ctx.num_tensors], others[ctx.num_tensors :]
        needed = (*ctx.needs_input_grad[1:3], *ctx.needs_input_grad[5:])
        d_hidden, d_weights, d_tensors = backward(ctx.call, dy, hidden, weights, order, place, tensors, kept, needed)
        return None, d_hidden, d_weights, None, None, *d_tensors


# --- the operation ----------------------------------------------------------------------------------------------


@torch.compiler.disable
def masked_experts(
    hidden_states: torch.Tensor,
    slot_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    slots,
    activation: Callable[[torch.Tensor], torch.Tensor],
    is_transposed: bool,
    *,
    int8_activations: bool | None = None,
    keep_activations: bool | None = None,
) -> torch.Tensor:
    """As `edgefed.kernels.masked_experts.masked_experts`, which see; not to be traced by torch.compile."""
    order, place, counts = sort_pairs(slot_indices, len(slots))
    if order.numel() == 0:
        return torch.zeros_like(hidden_states)
    streamed = getattr(slots, "streamed", False)
    tensors, experts, streamed_rows, begin = _Tensors(), [], [], 0
    tokens = order // slot_indices.shape[1]
    int8 = int8_activations is not False
    for slot, count in enumerate(counts):
        if count == 0:
            continue
        weights = slots[slot]
        up = tensors.projection(weights.up, weights.up_bias, weights.up_lora)
        down = tensors.projection(weights.down, weights.down_bias, weights.down_lora)
        for matrix in (up.matrix, down.matrix):
            if matrix.dtype not in _DTYPES:
                raise Unsupported(f"slot {slot} is {matrix.dtype}")
        experts.append(Expert(up, down, begin, begin + count))
        begin += count
        if streamed:  # one expert at a time in memory
            call = Call(tuple(experts), activation, is_transposed, int8, False, False)
            with torch.no_grad():
                streamed_rows.append(forward(call, hidden_states, tokens, tensors.all)[0])
            tensors, experts = _Tensors(), []
    if streamed:
        return combine(torch.cat(streamed_rows), place, expert_weights.detach(), hidden_states.dtype)
    learns = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden_states, expert_weights, *tensors.all)
    )
    if learns:
        int8 = int8_activations is True
        if keep_activations is None:
            kept = order.numel() * max(expert.up.matrix.shape[1 if is_transposed else 0] for expert in experts)
            dense = {p.matrix.data for expert in experts for p in (expert.up, expert.down) if p.matrix.scale < 0}
            keep_activations = kept < sum(tensors.all[i].numel() for i in dense if tensors.all[i].requires_grad)
    columns = experts[0].up.matrix.shape[1 if is_transposed else 0]
    gated = is_swiglu(activation, columns)
    call = Call(tuple(experts), activation, is_transposed, int8, bool(keep_activations and learns), gated)
    if learns:
        return _MaskedExperts.apply(call, hidden_states, expert_weights, order, place, *tensors.all)
    rows, _ = forward(call, hidden_states.detach(), tokens, tensors.all)
    return combine(rows, place, expert_weights, hidden_states.dtype)
