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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.autograd.function import once_differentiable

from edgefed.kernels.cuda_kernels import CudaKernels, Operand, SortedPairs, cuda_kernels
from edgefed.kernels.cuda_library import ROWS, TILES
from edgefed.kernels.dispatch import Unsupported
from edgefed.kernels.quantization import QuantizedMatrix
from edgefed.native import DTYPE_CODES, dtype_code

if TYPE_CHECKING:
    from edgefed.kernels.masked_experts import LowRankPair, Slots

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILES_FROM = 5
"""Rows per slot from which tiles are faster than rows: a tile of 64 rows takes the same time for 1 as for 64. Computed
from the instructions of both for an RTX 3060 (at 4 rows per slot 41 % and 31 % of the limit), not measured."""


def why_not(hidden_states: torch.Tensor, expert_weights: torch.Tensor, slots: object) -> str | None:
    """Return why this layer needs the reference, or None."""
    if hidden_states.dtype not in _DTYPES:
        return f"no kernel for {hidden_states.dtype}"
    if getattr(slots, "streamed", False):
        return "streamed experts are read one at a time, but CUDA kernels need all of them"
    return None


# --- the parts of a call ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Projection:
    """One of a slot's two matrices, with bias and adapter, as indices of the call's tensors; -1 for none."""

    data: int
    scale: int
    code: int
    blocksize: int
    bias: int
    lora: tuple[int, int, float] | None
    rank: int


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything about a call except its tensors. ``up_width`` is 2I, or I of an ungated expert."""

    kernels: CudaKernels
    ups: tuple[Projection, ...]
    downs: tuple[Projection, ...]
    dtype: torch.dtype
    up_width: int
    width: int
    activation: Callable[[torch.Tensor], torch.Tensor]
    is_transposed: bool
    kernel: int


class _Tensors:
    """Collects the tensors of a call and the dtypes of its slots."""

    def __init__(self) -> None:
        self.all: list[torch.Tensor] = []
        self.dtypes: set[torch.dtype] = set()

    def add(self, tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return -1
        self.all.append(tensor)
        return len(self.all) - 1

    def projection(
        self, weight: torch.Tensor | QuantizedMatrix, bias: torch.Tensor | None, lora: LowRankPair | None
    ) -> Projection:
        self.dtypes.add(weight.dtype)
        if isinstance(weight, QuantizedMatrix):
            data, scale = self.add(weight.packed), self.add(weight.scales())
            code, blocksize = DTYPE_CODES[weight.format], weight.blocksize
        else:
            data, scale, code, blocksize = self.add(weight), -1, -1, 0
        adapter = None if lora is None else (self.add(lora.lora_a), self.add(lora.lora_b), lora.scale)
        rank = 0 if lora is None else lora.lora_a.shape[0]
        return Projection(data, scale, code, blocksize, self.add(bias), adapter, rank)


def _prepare(tensors: list[torch.Tensor], call: Call) -> list[torch.Tensor]:
    """Make the tensors contiguous and convert them to the layer's dtype, except packed ones and scales."""
    packed = {index for side in (call.ups, call.downs) for p in side if p.scale >= 0 for index in (p.data, p.scale)}
    return [(tensor if index in packed else tensor.to(call.dtype)).contiguous() for index, tensor in enumerate(tensors)]


# --- projections ------------------------------------------------------------------------------------------------


def _weights(call: Call, side: tuple[Projection, ...], tensors: list[torch.Tensor], biased: bool) -> list[Operand]:
    own = dtype_code(call.dtype)
    return [
        Operand(
            tensors[p.data],
            own if p.code < 0 else p.code,
            tensors[p.scale] if p.scale >= 0 else None,
            p.blocksize,
            tensors[p.bias] if biased and p.bias >= 0 else None,
        )
        for p in side
    ]


def _adapters(
    call: Call, side: tuple[Projection, ...], tensors: list[torch.Tensor], which: Literal[0, 1], scaled: bool
) -> Iterator[tuple[int, list[Operand | None]]]:
    """Yield (rank, operands by slot) of the matrices A (which 0) or B (1) for each rank that occurs."""
    own = dtype_code(call.dtype)
    for rank in sorted({p.rank for p in side if p.lora is not None}):
        yield (
            rank,
            [
                Operand(tensors[p.lora[which]], own, alpha=p.lora[2] if scaled else 1.0)
                if p.lora is not None and p.rank == rank
                else None
                for p in side
            ],
        )


def project(
    call: Call,
    side: tuple[Projection, ...],
    tensors: list[torch.Tensor],
    pairs: SortedPairs,
    x: torch.Tensor,
    x_rows: torch.Tensor | None,
    outputs: int,
) -> torch.Tensor:
    """Compute a projection of all positions, (T*K, outputs), with biases and adapters."""
    run, kernel = call.kernels.grouped_matmul, call.kernel
    weights = _weights(call, side, tensors, biased=True)
    y = run(weights, pairs, x, x_rows, outputs, transposed=call.is_transposed, kernel=kernel)
    for (rank, a), (_, b) in zip(
        _adapters(call, side, tensors, 0, False), _adapters(call, side, tensors, 1, True), strict=True
    ):
        low = run(a, pairs, x, x_rows, rank, transposed=False, kernel=kernel)
        run(b, pairs, low, None, outputs, transposed=False, kernel=kernel, add_to=y)
    return y


def back_project(
    call: Call,
    side: tuple[Projection, ...],
    tensors: list[torch.Tensor],
    pairs: SortedPairs,
    dy: torch.Tensor,
    dy_rows: torch.Tensor | None,
    inputs: int,
) -> torch.Tensor:
    """Compute the gradient of a projection's input, (T*K, inputs), for dy (T*K, out) or dy[dy_rows]."""
    run = call.kernels.grouped_matmul
    weights = _weights(call, side, tensors, biased=False)
    dx = run(weights, pairs, dy, dy_rows, inputs, transposed=not call.is_transposed, kernel=call.kernel)
    for (rank, a), (_, b) in zip(
        _adapters(call, side, tensors, 0, False), _adapters(call, side, tensors, 1, True), strict=True
    ):
        low = run(b, pairs, dy, dy_rows, rank, transposed=True, kernel=call.kernel)
        run(a, pairs, low, None, inputs, transposed=True, kernel=call.kernel, add_to=dx)
    return dx


def weight_gradients(
    call: Call,
    side: tuple[Projection, ...],
    tensors: list[torch.Tensor],
    pairs: SortedPairs,
    dy: torch.Tensor,  # (T*K, out)
    x: torch.Tensor,
    x_rows: torch.Tensor | None,
    wants: Callable[[int], bool],
) -> dict[int, torch.Tensor]:
    """Compute a projection's gradients of weights, biases and adapters by tensor index. x (T*K, in) or x[x_rows]."""
    found: dict[int, torch.Tensor] = {}
    outer, run = call.kernels.grouped_outer, call.kernels.grouped_matmul

    def collect(
        indices: list[int], alphas: list[float], a: torch.Tensor, b: torch.Tensor, b_rows: torch.Tensor | None
    ) -> None:
        wanted = [alpha if wants(index) else None for index, alpha in zip(indices, alphas, strict=True)]
        if any(alpha is not None for alpha in wanted):
            for index, gradient in zip(indices, outer(wanted, pairs, a, b, b_rows), strict=True):
                if gradient is not None:
                    found[index] = gradient if index not in found else found[index] + gradient

    ones = [1.0] * len(side)
    dense = [p.data if p.scale < 0 else -1 for p in side]
    if call.is_transposed and any(map(wants, dense)):  # W is (in, out)
        rows = x if x_rows is None else x[x_rows.clamp(0, x.shape[0] - 1).long()]
        collect(dense, ones, rows, dy, None)
    else:
        collect(dense, ones, dy, x, x_rows)
    biases = [p.bias for p in side]
    if any(map(wants, biases)):
        collect(biases, ones, dy, torch.ones(dy.shape[0], 1, dtype=dy.dtype, device=dy.device), None)
    for (rank, a), (_, b) in zip(
        _adapters(call, side, tensors, 0, False), _adapters(call, side, tensors, 1, False), strict=True
    ):
        own = [p.lora if p.lora is not None and p.rank == rank else (-1, -1, 0.0) for p in side]
        scales = [lora[2] for lora in own]
        if any(wants(lora[1]) for lora in own):
            low = run(a, pairs, x, x_rows, rank, transposed=False, kernel=call.kernel)
            collect([lora[1] for lora in own], scales, dy, low, None)
        if any(wants(lora[0]) for lora in own):
            d_low = run(b, pairs, dy, None, rank, transposed=True, kernel=call.kernel)
            collect([lora[0] for lora in own], scales, d_low, x, x_rows)
    return found


# --- forward and backward ---------------------------------------------------------------------------------------


def forward(call: Call, x: torch.Tensor, tensors: list[torch.Tensor], pairs: SortedPairs) -> torch.Tensor:
    """Compute the outputs of all positions, (T*K, H)."""
    up = project(call, call.ups, tensors, pairs, x, pairs.tokens, call.up_width)
    return project(call, call.downs, tensors, pairs, call.activation(up), None, x.shape[1])


def backward(
    call: Call,
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    pairs: SortedPairs,
    tensors: list[torch.Tensor],
    needs_x: bool,
    wants: Callable[[int], bool],
) -> tuple[torch.Tensor | None, torch.Tensor, dict[int, torch.Tensor]]:
    """Compute the gradients of x (T, H), weights (T, K) float32 and tensors by index. dy, x: the layer's dtype."""
    kernels = call.kernels
    trains_down = any(wants(index) for p in call.downs for index in (p.data, p.bias, *(p.lora[:2] if p.lora else ())))
    up = project(call, call.ups, tensors, pairs, x, pairs.tokens, call.up_width)
    with torch.enable_grad():
        source = up.detach().requires_grad_()
        act = call.activation(source)
    d_act = back_project(call, call.downs, tensors, pairs, dy, pairs.tokens, call.width)  # D
    d_weights = torch.zeros_like(weights)
    inner = act.detach().contiguous()
    kernels.pair_dots_(d_act, inner, None, pairs, weights, d_weights)
    if any(p.bias >= 0 for p in call.downs):
        d_weights += _bias_dots(call, dy, pairs, tensors)
    gradients: dict[int, torch.Tensor] = {}
    if trains_down:
        weighted = kernels.spread(dy, pairs, weights)
        gradients.update(weight_gradients(call, call.downs, tensors, pairs, weighted, inner, None, wants))
    (d_up,) = torch.autograd.grad(act, source, d_act)
    d_up = d_up.contiguous()
    for index, gradient in weight_gradients(call, call.ups, tensors, pairs, d_up, x, pairs.tokens, wants).items():
        gradients[index] = gradient if index not in gradients else gradients[index] + gradient
    d_x = None
    if needs_x:
        rows = back_project(call, call.ups, tensors, pairs, d_up, None, x.shape[1])
        d_x = kernels.combine(rows, pairs, None)
    return d_x, d_weights, gradients


def _bias_dots(call: Call, dy: torch.Tensor, pairs: SortedPairs, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Compute dy[token] . b_down of each pair, (T, K) float32; 0 without a bias or a pair."""
    zero = torch.zeros(dy.shape[1], dtype=dy.dtype, device=dy.device)
    biases = torch.stack([tensors[p.bias] if p.bias >= 0 else zero for p in call.downs])  # (S, H)
    table = dy.float() @ biases.float().t()  # (T, S)
    begins = pairs.begins()[1:].contiguous()
    slots = torch.searchsorted(begins, pairs.place.reshape(-1), right=True).clamp(max=len(call.downs) - 1)  # (T*K,)
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
        ctx.save_for_backward(hidden, weights, pairs.order, pairs.tokens, pairs.place, pairs.work, *tensors)
        rows = forward(call, hidden.to(call.dtype), _prepare(list(tensors), call), pairs)
        return call.kernels.combine(rows.to(hidden.dtype), pairs, weights.float().contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        hidden, weights, order, tokens, place, work, *tensors = ctx.saved_tensors
        call, pairs = ctx.call, SortedPairs(order, tokens, place, work, ctx.num_slots)
        needed = ctx.needs_input_grad[4:]
        d_x, d_weights, gradients = backward(
            call,
            dy.to(call.dtype).contiguous(),
            hidden.to(call.dtype).contiguous(),
            weights.float().contiguous(),
            pairs,
            _prepare(tensors, call),
            ctx.needs_input_grad[1],
            lambda index: index >= 0 and needed[index],
        )
        if ctx.trains:
            begins, event = ctx.counts
            if event is not None:
                event.synchronize()
            begins = begins.tolist()
            for slot, (up, down) in enumerate(zip(call.ups, call.downs, strict=True)):
                if begins[slot] == begins[slot + 1]:
                    for p in (up, down):
                        for index in (p.data, p.bias, *(p.lora[:2] if p.lora else ())):
                            gradients.pop(index, None)
        found = [
            gradients[index].reshape(tensor.shape).to(tensor.dtype) if index in gradients else None
            for index, tensor in enumerate(tensors)
        ]
        return (
            None,
            None if d_x is None else d_x.to(hidden.dtype),
            d_weights.to(weights.dtype) if ctx.needs_input_grad[2] else None,
            None,
            *found,
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
    if slot_indices.numel() == 0 or len(slots) == 0:
        return torch.zeros_like(hidden_states)
    kernels = kernels or cuda_kernels()
    experts = [slots[slot] for slot in range(len(slots))]
    tensors = _Tensors()
    ups = tuple(tensors.projection(e.up, e.up_bias, e.up_lora) for e in experts)
    downs = tuple(tensors.projection(e.down, e.down_bias, e.down_lora) for e in experts)
    shapes = {(tuple(e.up.shape), tuple(e.down.shape)) for e in experts}
    if len(tensors.dtypes) > 1 or len(shapes) > 1:
        raise Unsupported(f"slots differ in dtype or shape: {sorted(map(str, tensors.dtypes))}, {sorted(shapes)}")
    (dtype,), ((up, down),) = tensors.dtypes, shapes
    if dtype not in _DTYPES:
        raise Unsupported(f"no kernel for weights of {dtype}")
    if kernel is None:
        kernel = ROWS if slot_indices.numel() < TILES_FROM * len(experts) else TILES
    side = 1 if is_transposed else 0
    call = Call(kernels, ups, downs, dtype, up[side], down[1 - side], activation, is_transposed, kernel)
    pairs = kernels.sort_pairs(slot_indices, len(experts))
    return _apply(call, hidden_states, expert_weights, pairs, *tensors.all)
