"""Masked experts on CUDA by the library of csrc/cuda_*.cu: `edgefed.kernels.masked_experts` with the same results.

For devices without Triton support (sm_75, Jetson) and for few tokens everywhere. The host never waits for the device:
pairs are sorted there, and kernels find their work in device memory. In return, every slot is read, needed or not, and
buffers have room for all T*K pairs, even if most are dropped.

The forward pass saves tokens, indices, gate weights and the weights as they are stored; the backward pass computes the
up projection again and decodes quantized weights again. With G = dy[token] and D = G W_down of a pair: d weight =
D . act + G . bias and d act = weight D, so the experts' outputs are not needed. The backward pass reads the counts only
if weights are trainable, to leave the gradient of a slot without tokens None; the forward pass copied them to the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from edgefed.kernels.cuda_kernels import CudaKernels, LowRank, SortedPairs, cuda_kernels
from edgefed.kernels.cuda_layout import DTYPES, Layout, Side, Structure, collect, lasting_layout
from edgefed.kernels.cuda_library import ROWS, TILES
from edgefed.kernels.dispatch import Unsupported
from edgefed.kernels.native_call import is_swiglu

if TYPE_CHECKING:
    from edgefed.kernels.masked_experts import Slots

__all__ = ["Unsupported", "masked_experts", "why_not"]

TILES_FROM = 5
"""Rows per slot from which tiles are faster than rows, which read the weights again for every four. Computed from the
instructions of both (benchmarks/report_cuda_limits.py) for NF4 on an RTX 3060: at 4 rows per slot 90 % and 66 % of the
limit, at 8 rows 51 % and 66 %; not measured."""


def why_not(hidden_states: torch.Tensor, expert_weights: torch.Tensor, slots: object) -> str | None:
    """Return why this layer needs the reference, or None."""
    if hidden_states.dtype not in DTYPES:
        return f"no kernel for {hidden_states.dtype}"
    if getattr(slots, "streamed", False):
        return "streamed experts are read one at a time, but CUDA kernels need all of them"
    return None


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything about a call except its tensors. ``layout`` is None for slots that do not last.

    ``indices``: which tensors of the structure autograd sees.
    """

    kernels: CudaKernels
    structure: Structure
    layout: Layout | None
    indices: tuple[int, ...]
    activation: Callable[[torch.Tensor], torch.Tensor]
    is_swiglu: bool
    kernel: int

    def layout_with(self, tensors: tuple[torch.Tensor, ...]) -> Layout:
        """Return the layout, made of ``tensors`` if the slots do not last."""
        return self.layout or Layout(self.structure, tensors)


# --- projections ------------------------------------------------------------------------------------------------


def project(
    call: Call, side: Side, pairs: SortedPairs, x: torch.Tensor, x_rows: torch.Tensor | None, outputs: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute a projection of all positions, (T*K, outputs), with biases and adapters; the fused x A^T, scaled."""
    run, kernel = call.kernels.grouped_matmul, call.kernel
    low = term = None
    if side.fused is not None:
        low = run(side.fused.scaled_a, pairs, x, x_rows, side.fused.rank, transposed=False, kernel=kernel)
        term = LowRank(low, side.fused.dtype)
    transposed = call.structure.is_transposed
    y = run(side.forward, pairs, x, x_rows, outputs, transposed=transposed, kernel=kernel, low_rank=term)
    for factors in side.others:
        other = run(factors.a, pairs, x, x_rows, factors.rank, transposed=False, kernel=kernel)
        run(factors.scaled_b, pairs, other, None, outputs, transposed=False, kernel=kernel, add_to=y)
    return y, low


def back_project(
    call: Call, side: Side, pairs: SortedPairs, dy: torch.Tensor, dy_rows: torch.Tensor | None, inputs: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the gradient of a projection's input, (T*K, inputs), for dy (T*K, out) or dy[dy_rows]; the fused dy B."""
    run, kernel = call.kernels.grouped_matmul, call.kernel
    low = term = None
    if side.fused is not None:
        low = run(side.fused.scaled_b, pairs, dy, dy_rows, side.fused.rank, transposed=True, kernel=kernel)
        term = LowRank(low, side.fused.dtype)
    transposed = not call.structure.is_transposed
    dx = run(side.backward, pairs, dy, dy_rows, inputs, transposed=transposed, kernel=kernel, low_rank=term)
    for factors in side.others:
        other = run(factors.b, pairs, dy, dy_rows, factors.rank, transposed=True, kernel=kernel)
        run(factors.scaled_a, pairs, other, None, inputs, transposed=True, kernel=kernel, add_to=dx)
    return dx, low


class Gradients:
    """Gradients of the tensors of a layer by index."""

    def __init__(self, call: Call, layout: Layout, wanted: frozenset[int]):
        self.of: dict[int, torch.Tensor] = {}
        self._call, self._layout, self._wanted = call, layout, wanted

    def wants(self, *groups: list[int]) -> bool:
        """Return whether any of the tensors of these lists by slot needs a gradient."""
        return any(not self._wanted.isdisjoint(group) for group in groups)

    def collect(
        self,
        indices: list[int],
        alphas: list[float],
        pairs: SortedPairs,
        a: torch.Tensor,
        b: torch.Tensor,
        b_rows: torch.Tensor | None,
        *,
        small: bool = False,
    ) -> None:
        """Add alpha * sum a b^T to the gradients of the tensors at ``indices``, by slot."""
        wanted = [alpha if index in self._wanted else None for index, alpha in zip(indices, alphas, strict=True)]
        if all(alpha is None for alpha in wanted):
            return
        dtypes = {self._layout.given[index] for index in indices if index in self._wanted}
        dtype = torch.float32 if dtypes == {torch.float32} else a.dtype
        found = self._call.kernels.grouped_outer(wanted, pairs, a, b, b_rows, dtype=dtype, together=small)
        for index, gradient in zip(indices, found, strict=True):
            if gradient is not None:
                self.of[index] = gradient if index not in self.of else self.of[index] + gradient

    def projection(
        self,
        side: Side,
        pairs: SortedPairs,
        dy: torch.Tensor,  # (T*K, out)
        x: torch.Tensor,
        x_rows: torch.Tensor | None,
        low: torch.Tensor | None,
        d_low: torch.Tensor | None,
    ) -> None:
        """Add the gradients of weights, biases and adapters; x (T*K, in) or x[x_rows].

        ``low`` is the fused x A^T and ``d_low`` the fused dy B, both scaled; None to compute them.
        """
        call = self._call
        run, kernel = call.kernels.grouped_matmul, call.kernel
        ones = [1.0] * len(side.projections)
        dense = [p.matrix.data if p.matrix.scale < 0 else -1 for p in side.projections]
        if call.structure.is_transposed and self.wants(dense):  # W is (in, out)
            rows = x if x_rows is None else x[x_rows.clamp(0, x.shape[0] - 1).long()]
            self.collect(dense, ones, pairs, rows, dy, None)
        else:
            self.collect(dense, ones, pairs, dy, x, x_rows)
        if self.wants(side.biases):
            column = torch.ones(dy.shape[0], 1, dtype=dy.dtype, device=dy.device)
            self.collect(side.biases, ones, pairs, dy, column, None, small=True)
        for factors in side.factors:
            is_fused = factors is side.fused
            if self.wants(factors.lora_b):
                own = low if is_fused else None
                if own is None:
                    own = run(factors.scaled_a, pairs, x, x_rows, factors.rank, transposed=False, kernel=kernel)
                self.collect(factors.lora_b, ones, pairs, dy, own, None, small=True)
            if self.wants(factors.lora_a):
                own = d_low if is_fused else None
                if own is None:
                    own = run(factors.scaled_b, pairs, dy, None, factors.rank, transposed=True, kernel=kernel)
                self.collect(factors.lora_a, ones, pairs, own, x, x_rows, small=True)


# --- forward and backward ---------------------------------------------------------------------------------------


def forward(call: Call, layout: Layout, x: torch.Tensor, pairs: SortedPairs) -> torch.Tensor:
    """Compute the outputs of all positions, (T*K, H), of x (T, H) in the layer's dtype."""
    up, _ = project(call, layout.up, pairs, x, pairs.tokens, call.structure.up_width)
    act = call.kernels.swiglu(up, pairs) if call.is_swiglu else call.activation(up)
    del up
    return project(call, layout.down, pairs, act, None, x.shape[1])[0]


def backward(
    call: Call,
    layout: Layout,
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    pairs: SortedPairs,
    needs_x: bool,
    wanted: frozenset[int],
) -> tuple[torch.Tensor | None, torch.Tensor, dict[int, torch.Tensor]]:
    """Compute the gradients of x (T, H), weights (T, K) float32 and tensors by index. dy, x: the layer's dtype."""
    kernels, gradients = call.kernels, Gradients(call, layout, wanted)
    trains_down = bool(wanted) and gradients.wants([index for p in layout.down.projections for index in p.trainable()])
    up, low = project(call, layout.up, pairs, x, pairs.tokens, call.structure.up_width)
    d_act, _ = back_project(call, layout.down, pairs, dy, pairs.tokens, call.structure.width)  # D
    if call.is_swiglu:
        d_weights = kernels.swiglu_backward_(up, d_act, pairs, weights, keeps_hidden=trains_down)
        inner, d_up = d_act, up
    else:
        with torch.enable_grad():
            source = up.detach().requires_grad_()
            act = call.activation(source)
        d_weights = torch.zeros_like(weights)
        inner = act.detach().contiguous()
        kernels.pair_dots_(d_act, inner, None, pairs, weights, d_weights)
        (d_up,) = torch.autograd.grad(act, source, d_act)
        d_up = d_up.contiguous()
        del act, source
    del up, d_act
    if any(index >= 0 for index in layout.down.biases):
        d_weights += _bias_dots(layout, dy, pairs)
    if trains_down:
        weighted = kernels.spread(dy, pairs, weights)
        gradients.projection(layout.down, pairs, weighted, inner, None, None, None)
        del weighted
    del inner
    d_x = d_low = None
    if needs_x:
        rows, d_low = back_project(call, layout.up, pairs, d_up, None, x.shape[1])
        d_x = kernels.combine(rows, pairs, None)
        del rows
    gradients.projection(layout.up, pairs, d_up, x, pairs.tokens, low, d_low)
    return d_x, d_weights, gradients.of


def _bias_dots(layout: Layout, dy: torch.Tensor, pairs: SortedPairs) -> torch.Tensor:
    """Compute dy[token] . b_down of each pair, (T, K) float32; 0 without a bias or a pair."""
    zero = torch.zeros(dy.shape[1], dtype=dy.dtype, device=dy.device)
    biases = torch.stack([layout.tensors[index] if index >= 0 else zero for index in layout.down.biases])  # (S, H)
    table = dy.float() @ biases.float().t()  # (T, S)
    begins = pairs.begins()[1:].contiguous()
    slots = torch.searchsorted(begins, pairs.place.reshape(-1), right=True).clamp(max=len(biases) - 1)  # (T*K,)
    values = table.gather(1, slots.view(pairs.place.shape))
    return values.masked_fill(pairs.place < 0, 0.0)


def _counts_to_host(pairs: SortedPairs) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Copy the begins by slot to the host; the event is recorded when they have arrived."""
    begins = pairs.begins()
    if not begins.is_cuda:
        return begins.clone(), None
    host = torch.empty(begins.shape, dtype=begins.dtype, pin_memory=True)
    host.copy_(begins, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(begins.device))
    return host, event


def _run(call: Call, layout: Layout, hidden: torch.Tensor, weights: torch.Tensor, pairs: SortedPairs) -> torch.Tensor:
    rows = forward(call, layout, hidden.to(call.structure.dtype), pairs)
    return call.kernels.combine(rows.to(hidden.dtype), pairs, weights.float().contiguous())


class _MaskedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        pairs: SortedPairs,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.call, ctx.num_slots = call, pairs.num_slots
        ctx.trains = any(ctx.needs_input_grad[4:])
        ctx.counts = _counts_to_host(pairs) if ctx.trains else None
        kept = tensors if call.layout is None else ()
        ctx.save_for_backward(hidden, weights, pairs.order, pairs.tokens, pairs.place, pairs.work, *kept)
        return _run(call, call.layout_with(tensors), hidden, weights, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        hidden, weights, order, tokens, place, work, *kept = ctx.saved_tensors
        call: Call = ctx.call
        pairs = SortedPairs(order, tokens, place, work, ctx.num_slots)
        layout = call.layout_with(kept)
        dtype = call.structure.dtype
        needed = ctx.needs_input_grad[4:]
        wanted = frozenset(index for index, needs in zip(call.indices, needed, strict=True) if needs)
        d_x, d_weights, gradients = backward(
            call, layout, dy.to(dtype).contiguous(), hidden.to(dtype).contiguous(), weights.float().contiguous(), pairs,
            ctx.needs_input_grad[1], wanted,
        )  # fmt: skip
        if ctx.trains:
            begins, event = ctx.counts
            if event is not None:
                event.synchronize()
            begins = begins.tolist()
            for slot, sides in enumerate(zip(call.structure.ups, call.structure.downs, strict=True)):
                if begins[slot] == begins[slot + 1]:
                    for index in (index for p in sides for index in p.trainable()):
                        gradients.pop(index, None)
        return (
            None,
            None if d_x is None else d_x.to(hidden.dtype),
            d_weights.to(weights.dtype) if ctx.needs_input_grad[2] else None,
            None,
            *(layout.as_given(index, gradients.get(index)) for index in call.indices),
        )


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
    kernels: CudaKernels | None = None,
    kernel: int | None = None,
) -> torch.Tensor:
    """Compute `edgefed.kernels.masked_experts.masked_experts` on CUDA.

    Every slot is read, and a slot >= S aborts the device. ``kernels``: None for the installed ones; ``kernel``: one of
    `cuda_library`, None to choose. Raises Unsupported if slots differ in dtype or shape, or have one without a kernel.
    """
    num_slots = len(slots)
    if slot_indices.numel() == 0 or num_slots == 0:
        return torch.zeros_like(hidden_states)
    kernels = kernels or cuda_kernels()
    layout = lasting_layout(slots, is_transposed)
    if layout is not None:
        structure = layout.structure
        indices = layout.trainable_of(getattr(slots, "scheduled", None)) if torch.is_grad_enabled() else ()
        tensors = [layout.tensors[index] for index in indices]
    else:
        structure, tensors = collect(slots, is_transposed)
        indices = tuple(range(len(tensors)))
    if kernel is None:
        kernel = ROWS if slot_indices.numel() < TILES_FROM * num_slots else TILES
    gated = is_swiglu(activation, structure.up_width)
    call = Call(kernels, structure, layout, indices, activation, gated, kernel)
    pairs = kernels.sort_pairs(slot_indices, num_slots)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_states, expert_weights, *tensors)):
        return _apply(call, hidden_states, expert_weights, pairs, *tensors)
    return _run(call, call.layout_with(tuple(tensors)), hidden_states, expert_weights, pairs)
