"""masked_experts on the GPU: the launches of one MoE layer, forward and backward, without waiting for the device.

A layer runs in one of two ways, with the same values:

    fused       SwiGLU experts without bias, norm or transposed weights: one autograd node. Gate, products and gate
                weights run inside two grouped products; the backward pass computes the up projection again, so that a
                layer saves only its tokens, indices, gate weights and the experts' own (packed) tensors.
    composed    everything else: projections, the layer's own gate in PyTorch, and the weighted sum are nodes of
                their own and save what autograd needs in between.

Buffers have T*K rows, because only the device knows how many pairs are dropped. Gradients of a slot without a token
stay None, as in the reference: the number of tokens per slot is copied to the host during the forward pass and read in
the backward pass, long after it has arrived. The host waits only there, and only in a trainable layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .combine import combine, combine_backward
from .gate import is_swiglu, swiglu, swiglu_backward
from .grouped_matmul import rows_per_tile
from .grouped_outer import column_sums, grouped_outer
from .layer import Form, layer_of
from .neuron_energy import EnergySums, add_neuron_energy, energy_sums
from .projection import Projection, Unsupported, new_rows
from .sort_pairs import MAX_SLOTS, SortedPairs, sort_pairs
from .tensor_types import TYPES, device_table


class TokenCounts:
    """Tokens per slot, copied to the host asynchronously."""

    def __init__(self, pairs: SortedPairs):
        self._event = None
        if pairs.offsets.device.type == "cuda":
            self._offsets = torch.empty(pairs.offsets.shape, dtype=torch.int32, pin_memory=True)
            self._offsets.copy_(pairs.offsets, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(pairs.offsets.device))
        else:
            self._offsets = pairs.offsets

    def has_tokens(self) -> list[bool]:
        """Return whether each slot has tokens. Waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return (self._offsets.diff() > 0).tolist()


def why_not(hidden_states: torch.Tensor, expert_weights: torch.Tensor, slots: object) -> str | None:
    """Return why this layer needs another backend, or None."""
    if hidden_states.dtype not in TYPES or expert_weights.dtype not in TYPES:
        return f"no Triton kernel for {hidden_states.dtype} tokens with {expert_weights.dtype} weights"
    if getattr(slots, "streamed", False):
        return "streamed experts are read one at a time, but a launch needs all of them"
    return None


def masked_experts(
    hidden_states: torch.Tensor,
    slot_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    slots,
    *,
    activation: Callable[[torch.Tensor], torch.Tensor],
    is_transposed: bool = False,
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
    keep_activations: bool | None = None,
    neuron_energy: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute the weighted sum of each token's resident experts, as `edgefed.kernels.masked_experts` defines it.

    Reads every slot once per call, needed or not, because only the device knows the slots: streamed experts need
    another backend. For the same reason a slot index >= S counts as dropped. If ``activation`` is SwiGLU, as
    `gate.is_swiglu` finds by running it, it runs inside the products. ``keep_activations`` saves the up projection
    (T*K, 2I) for the backward pass instead of computing it again; None saves it if it is smaller than the gradients of
    the trainable dense weights. ``neuron_energy``: accumulators (I,) of the slots, see `neuron_energy.energy_sums`.

    Raises ValueError if shapes do not match; Unsupported, a ValueError, for dtypes and layouts without a kernel and for
    more than MAX_SLOTS slots.
    """
    if hidden_states.ndim != 2 or slot_indices.ndim != 2 or slot_indices.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"hidden_states {tuple(hidden_states.shape)} and slot_indices {tuple(slot_indices.shape)} "
            "must be (T, H) and (T, K)"
        )
    if slot_indices.shape != expert_weights.shape:
        raise ValueError(
            f"slot_indices {tuple(slot_indices.shape)} and expert_weights {tuple(expert_weights.shape)} differ"
        )
    reason = why_not(hidden_states, expert_weights, slots)
    if reason is not None:
        raise Unsupported(reason)
    num_slots = len(slots)
    if slot_indices.numel() == 0 or num_slots == 0:
        return torch.zeros_like(hidden_states)
    if num_slots > MAX_SLOTS:
        raise Unsupported(f"{num_slots} slots in one layer; the maximum is {MAX_SLOTS}")
    with torch.cuda.device_of(hidden_states):
        layer = layer_of(slots, is_transposed)
        is_plain_layer = finish is None and not is_transposed and not layer.has_bias
        dtype = layer.dtype
        rows_of_tile = rows_per_tile(slot_indices.numel(), num_slots, dtype.itemsize)
        pairs = sort_pairs(slot_indices, num_slots, rows_of_tile)
        expert_weights = expert_weights.contiguous()
        tokens = hidden_states.to(dtype).contiguous()
        scheduled = getattr(slots, "scheduled", None)
        up, down = layer.up.form(scheduled), layer.down.form(scheduled)
        up_tensors = [layer.up.tensors[index] for index in up.indices]
        down_tensors = [layer.down.tensors[index] for index in down.indices]
        sums: EnergySums | None = None
        if neuron_energy is not None:
            width = layer.down.shape[0 if is_transposed else 1]
            sums = energy_sums(neuron_energy, num_slots, width, hidden_states.device)
        if is_plain_layer and is_swiglu(activation, layer.down.shape[1]):
            if keep_activations is None:
                trainable = layer.up.num_trainable(up) + layer.down.num_trainable(down)
                keep_activations = pairs.num_pairs * layer.up.shape[0] < trainable
            saved_slots = slot_indices.contiguous() if keep_activations and torch.is_grad_enabled() else None
            tensors = (*up_tensors, *down_tensors)
            out = _FusedExperts.apply(tokens, expert_weights, pairs, (up, down), saved_slots, sums, *tensors)
            return out.to(hidden_states.dtype)
        hidden = activation(_GroupedLinear.apply(tokens, pairs, up, True, *up_tensors)).to(tokens.dtype).contiguous()
        if sums is not None:
            projection = down.projection(tuple(down_tensors))
            with torch.no_grad():
                add_neuron_energy(sums, hidden.detach(), expert_weights.detach(), pairs, projection, is_split=False)
        rows = _GroupedLinear.apply(hidden, pairs, down, False, *down_tensors)
        if finish is not None:
            rows = finish(rows)
        return _Combine.apply(rows.contiguous(), expert_weights, pairs, hidden_states.dtype)


class _Gradients:
    """Gradients of a projection's tensors by index of the flat list; None for a slot without tokens or a frozen tensor.

    The gradients are views of stacks over all trainable slots.
    """

    def __init__(self, projection: Projection, needs_grad: tuple[bool, ...], has_tokens: list[bool]):
        self._projection, self._needs_grad, self._has_tokens = projection, needs_grad, has_tokens
        self.values: list[torch.Tensor | None] = [None] * len(needs_grad)

    def trainable(self, part: str, slots: list[int]) -> list[int]:
        """Return those of ``slots`` that have a tensor ``part`` that needs a gradient."""
        places = {slot: getattr(self._projection.layouts[slot], part) for slot in slots}
        return [slot for slot, place in places.items() if place >= 0 and self._needs_grad[place]]

    def add(self, part: str, slots: list[int], compute: Callable[[torch.Tensor, torch.dtype], torch.Tensor]) -> None:
        """Set the gradients of the tensors ``part`` of ``slots`` to compute(slot ids, dtype), (num_ids, ...)."""
        trainable = self.trainable(part, slots)
        if not any(self._has_tokens[slot] for slot in trainable):
            return
        tensors, layouts = self._projection.tensors, self._projection.layouts
        first = tensors[getattr(layouts[trainable[0]], part)]
        stack = compute(device_table(tuple(trainable), torch.int32, first.device), first.dtype)
        for row, slot in enumerate(trainable):
            if self._has_tokens[slot]:
                place = getattr(layouts[slot], part)
                self.values[place] = stack[row].view(tensors[place].shape)


def _add_gradients(
    gradients: _Gradients,
    projection: Projection,
    pairs: SortedPairs,
    inputs: torch.Tensor,  # (T or T*K, in), natural order of columns
    grad: torch.Tensor,  # (T or T*K, out)
    forward_lows: list[torch.Tensor | None],
    backward_lows: list[torch.Tensor | None],
    *,
    inputs_are_tokens: bool,
    grad_is_tokens: bool,
) -> None:
    """DW = grad^T x, dA = low(grad)^T x, dB = grad^T low(x), db = sum of grad, per group."""
    for group, low_x, low_grad in zip(projection.groups, forward_lows, backward_lows, strict=True):
        slots = projection.slots_of(group)
        left, right = (grad, inputs), (grad_is_tokens, inputs_are_tokens)
        if projection.is_transposed:
            left, right = left[::-1], right[::-1]
        if group.layout.format == "plain":
            gradients.add(
                "weight",
                slots,
                lambda ids, dtype, left=left, right=right: grouped_outer(
                    *left, pairs, ids, dtype, left_is_tokens=right[0], right_is_tokens=right[1]
                ),
            )
        if low_x is not None:
            gradients.add(
                "lora_b",
                slots,
                lambda ids, dtype, low=low_x: grouped_outer(
                    grad, low, pairs, ids, dtype, left_is_tokens=grad_is_tokens
                ),
            )
            gradients.add(
                "lora_a",
                slots,
                lambda ids, dtype, low=low_grad: grouped_outer(
                    low, inputs, pairs, ids, dtype, right_is_tokens=inputs_are_tokens
                ),
            )
        if group.bias is not None:
            gradients.add("bias", slots, lambda ids, dtype: column_sums(grad, pairs, ids, dtype))


class _FusedExperts(torch.autograd.Function):
    """tokens (T, H), expert_weights (T, K), then the tensors of the up and of the down projection -> (T, H)."""

    @staticmethod
    def forward(ctx, tokens, expert_weights, pairs, forms, saved_slots, sums, *tensors):
        up, down = _projections(forms, tensors)
        hidden = new_rows(pairs, down.size_in, tokens)
        gate_up = None
        if saved_slots is None:
            up.forward(tokens, hidden, pairs, is_tokens=True, gated=True, splits_out=True)
        else:
            gate_up = new_rows(pairs, up.size_out, tokens)
            up.forward(tokens, gate_up, pairs, is_tokens=True)
            is_split = tuple(int(part.format == "nf4") for part in down.layouts)
            swiglu(gate_up, hidden, pairs, saved_slots, device_table(is_split, torch.int32, tokens.device))
        if sums is not None:
            add_neuron_energy(sums, hidden, expert_weights, pairs, down, is_split=True)
        rows = new_rows(pairs, down.size_out, tokens)
        down.forward(hidden, rows, pairs, is_split=True, row_scale=expert_weights)
        kept = () if forms[0].built else tensors
        ctx.save_for_backward(tokens, expert_weights, gate_up, *pairs.tensors(), *kept)
        ctx.pairs_form, ctx.forms = (pairs.top_k, pairs.rows_per_tile), forms
        ctx.counts = TokenCounts(pairs) if any(ctx.needs_input_grad[6:]) else None
        return combine(rows, pairs, tokens.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        tokens, expert_weights, gate_up, *rest = ctx.saved_tensors
        pairs = SortedPairs(*rest[:5], *ctx.pairs_form)
        grad = grad.contiguous()
        up_form, down_form = ctx.forms
        up, down = _projections(ctx.forms, tuple(rest[5:]))
        gate_up_grad = new_rows(pairs, up.size_out, tokens)
        if gate_up is None:
            gate_up = gate_up_grad  # its gradient takes its place
            up_lows = up.forward(tokens, gate_up, pairs, is_tokens=True)
        else:
            up_lows = up.low_rows(tokens, pairs, is_tokens=True)
        hidden = new_rows(pairs, down.size_in, tokens)  # dL/dh without the gate weight, then the weighted h
        down_grad_lows = down.backward(grad, hidden, pairs, is_tokens=True)
        weight_grad = swiglu_backward(gate_up, hidden, gate_up_grad, pairs, expert_weights)
        needs = ctx.needs_input_grad[6:]
        rows = new_rows(pairs, up.size_in, tokens)
        up_grad_lows = up.backward(gate_up_grad, rows, pairs)
        token_grad = combine(rows, pairs, tokens.dtype) if ctx.needs_input_grad[0] else None
        del rows
        values: list[torch.Tensor | None] = [None] * len(needs)
        if any(needs):
            has_tokens = ctx.counts.has_tokens()
            num_up = len(up_form.indices)
            up_gradients = _Gradients(up, up_form.needs(needs[:num_up]), has_tokens)
            _add_gradients(
                up_gradients, up, pairs, tokens, gate_up_grad, up_lows, up_grad_lows,
                inputs_are_tokens=True, grad_is_tokens=False,
            )  # fmt: skip
            down_gradients = _Gradients(down, down_form.needs(needs[num_up:]), has_tokens)
            down_lows = down.low_rows(hidden, pairs)
            _add_gradients(
                down_gradients, down, pairs, hidden, grad, down_lows, down_grad_lows,
                inputs_are_tokens=False, grad_is_tokens=True,
            )  # fmt: skip
            values = up_form.seen_of(up_gradients.values) + down_form.seen_of(down_gradients.values)
        return token_grad, weight_grad if ctx.needs_input_grad[1] else None, None, None, None, None, *values


def _projections(forms: tuple[Form, Form], tensors: tuple[torch.Tensor, ...]) -> tuple[Projection, Projection]:
    up, down = forms
    return up.projection(tensors[: up.num_tensors]), down.projection(tensors[up.num_tensors :])


class _GroupedLinear(torch.autograd.Function):
    """a (T, in) tokens or (T*K, in) by position -> (T*K, out) by position; zero without a pair."""

    @staticmethod
    def forward(ctx, a, pairs, form, is_tokens, *tensors):
        projection = form.projection(tensors)
        out = new_rows(pairs, projection.size_out, a, zeros=True)
        projection.forward(a, out, pairs, is_tokens=is_tokens)
        ctx.save_for_backward(a, *pairs.tensors(), *(() if form.built else tensors))
        ctx.form, ctx.is_tokens, ctx.pairs_form = form, is_tokens, (pairs.top_k, pairs.rows_per_tile)
        ctx.counts = TokenCounts(pairs) if any(ctx.needs_input_grad[4:]) else None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        a, *rest = ctx.saved_tensors
        pairs = SortedPairs(*rest[:5], *ctx.pairs_form)
        form, is_tokens = ctx.form, ctx.is_tokens
        projection = form.projection(tuple(rest[5:]))
        grad = grad.contiguous()
        rows = new_rows(pairs, projection.size_in, a, zeros=True)
        grad_lows = projection.backward(grad, rows, pairs)
        a_grad = combine(rows, pairs, a.dtype) if is_tokens else rows
        needs = ctx.needs_input_grad[4:]
        values: list[torch.Tensor | None] = [None] * len(needs)
        if any(needs):
            gradients = _Gradients(projection, form.needs(needs), ctx.counts.has_tokens())
            lows = projection.low_rows(a, pairs, is_tokens=is_tokens)
            _add_gradients(
                gradients, projection, pairs, a, grad, lows, grad_lows,
                inputs_are_tokens=is_tokens, grad_is_tokens=False,
            )  # fmt: skip
            values = form.seen_of(gradients.values)
        return a_grad, None, None, None, *values


class _Combine(torch.autograd.Function):
    """rows (T*K, H) by position, expert_weights (T, K) -> (T, H)."""

    @staticmethod
    def forward(ctx, rows, expert_weights, pairs, dtype):
        ctx.save_for_backward(rows, expert_weights, *pairs.tensors())
        ctx.pairs_form = (pairs.top_k, pairs.rows_per_tile)
        return combine(rows, pairs, dtype, expert_weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, expert_weights, *rest = ctx.saved_tensors
        pairs = SortedPairs(*rest, *ctx.pairs_form)
        rows_grad, weight_grad = combine_backward(grad.contiguous(), rows, pairs, expert_weights)
        return rows_grad, weight_grad, None, None
