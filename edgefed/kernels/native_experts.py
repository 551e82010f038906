"""Masked experts on the CPU by the native library: `edgefed.kernels.masked_experts` with the same results, faster.

Pairs are sorted by slot without the dropped ones. Each projection is then one call for all experts, which reads each
expert's matrix once, packed or dense, and multiplies it with its rows of x (`edgefed.kernels.native_products`).

The forward pass saves tokens, indices, gate weights and the weights as they are stored. The backward pass computes the
up projection again (a third of the forward's arithmetic) unless it was saved, and decodes quantized weights again. With
G = dy[token] and D = G W_down of a pair: d weight = D . act, d act = weight D, so the expert's output is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from edgefed.kernels.native_call import Call, Expert, Projection, Tensors, is_swiglu
from edgefed.kernels.native_products import (
    combine,
    grouped_product,
    outer,
    sort_pairs,
    swiglu,
    swiglu_backward,
)
from edgefed.kernels.neuron_energy import add_neuron_energy
from edgefed.kernels.row_sizes import multiply_rows, pad_rows

if TYPE_CHECKING:
    from edgefed.kernels.masked_experts import Slots
    from edgefed.kernels.quantization import QuantizedMatrix

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATED_ROWS = 256
"""Pairs per call of a torch activation, which bounds its temporary memory."""


class Unsupported(Exception):
    """The experts that were read need the reference. The message is the reason."""


def why_not(hidden_states: torch.Tensor, expert_weights: torch.Tensor, slots: object) -> str | None:
    """Return why this layer needs the reference, or None."""
    if hidden_states.dtype not in _DTYPES:
        return f"no kernel for {hidden_states.dtype}"
    if (
        getattr(slots, "streamed", False)
        and torch.is_grad_enabled()
        and (hidden_states.requires_grad or expert_weights.requires_grad)
    ):
        return "streamed experts do not stay in memory for a backward pass"
    return None


# --- forward ----------------------------------------------------------------------------------------------------


def runs_of(experts: tuple[Expert, ...]) -> list[list[Expert]]:
    """Split experts into runs of one weight dtype, in which each run is computed, and of one width."""
    runs: list[list[Expert]] = []
    for expert in experts:
        last = runs[-1][-1] if runs else expert
        if not runs or (last.up.matrix.dtype, last.width) != (expert.up.matrix.dtype, expert.width):
            runs.append([])
        runs[-1].append(expert)
    return runs


def project(
    call: Call, run: list[Expert], name: str, tensors: list[torch.Tensor], x: torch.Tensor, x_rows: torch.Tensor | None,
    int8: bool,
) -> torch.Tensor:  # fmt: skip
    """Compute the ``name`` ("up" or "down") projection of a run, (P, out), with biases and adapters."""
    first, count = run[0].begin, run[-1].end - run[0].begin
    projections = [(getattr(expert, name), expert.begin - first, expert.end - first) for expert in run]
    entries = [(projection.matrix, begin, end) for projection, begin, end in projections]
    out = grouped_product(entries, tensors, x, x_rows, count, call.is_transposed, int8)
    for projection, begin, end in projections:
        if projection.bias >= 0:
            out[begin:end] += tensors[projection.bias]
        if projection.lora is not None:
            a, b, scale = projection.lora
            rows, index = (x[begin:end], None) if x_rows is None else (x, x_rows[begin:end])
            low, weight = tensors[a].to(x.dtype).t(), tensors[b].to(x.dtype).t()
            multiply_rows(rows, index, weight, out[begin:end], low, scale)
    return out


def forward(
    call: Call, hidden: torch.Tensor, tokens: torch.Tensor, tensors: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute the outputs of all sorted pairs, (P, H), and the up projection of each run."""
    outputs: list[torch.Tensor] = []
    saved: list[torch.Tensor] = []
    for run in runs_of(call.experts):
        x = hidden.to(run[0].up.matrix.dtype).contiguous()
        up = project(call, run, "up", tensors, x, tokens[run[0].begin : run[-1].end], call.int8)
        act = swiglu(up) if call.is_swiglu else torch.cat(list(map(call.activation, torch.split(up, ACTIVATED_ROWS))))
        outputs.append(project(call, run, "down", tensors, act, None, call.int8))
        if call.on_activation is not None:
            for expert in run:
                call.on_activation(expert, act[expert.begin - run[0].begin : expert.end - run[0].begin])
        if call.keep_activations:
            saved.append(up)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), saved


# --- backward ---------------------------------------------------------------------------------------------------


def _activation_backward(
    call: Call, up: torch.Tensor, d: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the same as `swiglu_backward` for any torch activation."""
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
    """Gradients by the index of the tensor in the call."""

    def __init__(self, tensors: list[torch.Tensor], needed: tuple[bool, ...]):
        self.tensors, self.needed = tensors, needed
        self.of: list[torch.Tensor | None] = [None] * len(tensors)

    def wants(self, index: int) -> bool:
        """Return whether the tensor needs a gradient."""
        return index >= 0 and self.needed[index]

    def add(self, index: int, value: torch.Tensor) -> None:
        """Add to the gradient of a tensor, in its dtype."""
        value, before = value.to(self.tensors[index].dtype), self.of[index]
        self.of[index] = value if before is None else before + value

    def projection(
        self,
        projection: Projection,
        dy: torch.Tensor,  # (p, out)
        x: torch.Tensor,
        x_rows: torch.Tensor | None,
        is_transposed: bool,
    ) -> None:
        """Add the gradients of one projection's weight, bias and adapter. x (p, in) or x[x_rows]."""
        if self.wants(projection.matrix.data):
            if is_transposed:
                rows = (x if x_rows is None else x[x_rows]).contiguous()
                gradient = outer(rows, dy, None)
            else:
                gradient = outer(dy, x, x_rows)
            self.add(projection.matrix.data, gradient)
        if self.wants(projection.bias):
            self.add(projection.bias, dy.sum(0, dtype=torch.float32))
        if projection.lora is None:
            return
        a, b, scale = projection.lora
        if self.wants(a) or self.wants(b):
            rows, dy = pad_rows(x, x_rows), pad_rows(dy)
            if self.wants(b):
                low = torch.mm(rows, self.tensors[a].to(x.dtype).t())
                self.add(b, torch.mm(dy.t(), low) * scale)
            if self.wants(a):
                d_low = torch.mm(dy, self.tensors[b].to(x.dtype))
                self.add(a, torch.mm(d_low.t(), rows) * scale)


def back_project(
    call: Call,
    run: list[Expert],
    name: str,
    tensors: list[torch.Tensor],
    dy: torch.Tensor,
    dy_rows: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the gradient of a projection's input, (P, in), for dy (P, out) or dy[dy_rows]."""
    first, count = run[0].begin, run[-1].end - run[0].begin
    projections = [(getattr(expert, name), expert.begin - first, expert.end - first) for expert in run]
    entries = [(projection.matrix, begin, end) for projection, begin, end in projections]
    out = grouped_product(entries, tensors, dy, dy_rows, count, not call.is_transposed, False)
    for projection, begin, end in projections:
        if projection.lora is not None:
            a, b, scale = projection.lora
            rows, index = (dy[begin:end], None) if dy_rows is None else (dy, dy_rows[begin:end])
            low, weight = tensors[b].to(dy.dtype), tensors[a].to(dy.dtype)
            multiply_rows(rows, index, weight, out[begin:end], low, scale)
    return out


def backward(
    call: Call,
    dy: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    place: torch.Tensor,
    tensors: list[torch.Tensor],
    saved: list[torch.Tensor],
    needed: tuple[bool, ...],
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
    """Compute the gradients of hidden (T, H), weights (T, K) and the tensors; ``needed`` selects, in that order."""
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
        up = saved[number] if saved else project(call, run, "up", tensors, x, rows, False)
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
            if any(gradients.wants(index) for index in down.trainable()):
                weighted = g[own] * factor[begin:end].unsqueeze(1).to(dtype)
                gradients.projection(down, weighted, act[begin:end], None, call.is_transposed)
                del weighted
            gradients.projection(expert.up, d_up[begin:end], x, own, call.is_transposed)
        del act  # before the input's gradient, which is as large
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
    def forward(
        ctx: Any,
        call: Call,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        order: torch.Tensor,
        place: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        rows, saved = forward(call, hidden, order // weights.shape[1], list(tensors))
        ctx.call = call
        ctx.num_tensors = len(tensors)
        ctx.save_for_backward(hidden, weights, order, place, *tensors, *saved)
        return combine(rows, place, weights, hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        hidden, weights, order, place, *others = ctx.saved_tensors
        tensors, saved = others[: ctx.num_tensors], others[ctx.num_tensors :]
        needed = (*ctx.needs_input_grad[1:3], *ctx.needs_input_grad[5:])
        d_hidden, d_weights, d_tensors = backward(ctx.call, dy, hidden, weights, order, place, tensors, saved, needed)
        return None, d_hidden, d_weights, None, None, *d_tensors


_apply: Callable[..., torch.Tensor] = _MaskedExperts.apply


# --- the operation ----------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def masked_experts(
    hidden_states: torch.Tensor,
    slot_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    slots: Slots,
    activation: Callable[[torch.Tensor], torch.Tensor],
    is_transposed: bool,
    *,
    int8_activations: bool | None = None,
    keep_activations: bool | None = None,
    neuron_energy: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute `edgefed.kernels.masked_experts.masked_experts` on the CPU. torch.compile does not trace it."""
    order, place, counts = sort_pairs(slot_indices, len(slots))
    if order.numel() == 0:
        return torch.zeros_like(hidden_states)
    streamed = getattr(slots, "streamed", False)
    tensors, begin = Tensors(), 0
    experts: list[Expert] = []
    streamed_rows: list[torch.Tensor] = []
    tokens = order // slot_indices.shape[1]
    int8 = int8_activations is not False
    measured: dict[int, tuple[torch.Tensor, torch.Tensor | QuantizedMatrix]] = {}  # by the first pair of an expert

    def measure(expert: Expert, act: torch.Tensor) -> None:
        energy, down = measured.pop(expert.begin)
        pair_weights = expert_weights.reshape(-1)[order[expert.begin : expert.end]]
        add_neuron_energy(energy, act, pair_weights, down, is_transposed=is_transposed)

    on_activation = None if neuron_energy is None else measure
    for slot, count in enumerate(counts):
        if count == 0:
            continue
        weights = slots[slot]
        up = tensors.projection(weights.up, weights.up_bias, weights.up_lora)
        down = tensors.projection(weights.down, weights.down_bias, weights.down_lora)
        for matrix in (up.matrix, down.matrix):
            if matrix.dtype not in _DTYPES:
                raise Unsupported(f"no kernel for slot {slot} in {matrix.dtype}")
        experts.append(Expert(up, down, begin, begin + count, up.matrix.shape[1 if is_transposed else 0]))
        if neuron_energy is not None:
            measured[begin] = neuron_energy[slot], weights.down
        begin += count
        if streamed:  # one expert at a time in memory
            call = Call(tuple(experts), activation, is_transposed, int8, False, False, on_activation)
            with torch.no_grad():
                streamed_rows.append(forward(call, hidden_states, tokens, tensors.all)[0])
            tensors, experts = Tensors(), []
    if streamed:
        return combine(torch.cat(streamed_rows), place, expert_weights.detach(), hidden_states.dtype)
    needs_grad = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden_states, expert_weights, *tensors.all)
    )
    if needs_grad:
        int8 = int8_activations is True
        if keep_activations is None:
            size = sum((expert.end - expert.begin) * expert.width for expert in experts)
            dense = {p.matrix.data for expert in experts for p in (expert.up, expert.down) if p.matrix.scale < 0}
            keep_activations = size < sum(tensors.all[i].numel() for i in dense if tensors.all[i].requires_grad)
    gated = all(is_swiglu(activation, columns) for columns in {expert.width for expert in experts})
    keep = bool(keep_activations and needs_grad)
    call = Call(tuple(experts), activation, is_transposed, int8, keep, gated, on_activation)
    if needs_grad:
        return _apply(call, hidden_states, expert_weights, order, place, *tensors.all)
    rows, _ = forward(call, hidden_states.detach(), tokens, tensors.all)
    return combine(rows, place, expert_weights, hidden_states.dtype)
