"""Masked experts: the feed-forward experts of one MoE layer, of which only some are resident on a device.

    y[t] = sum_k expert_weights[t, k] * Expert_{slot_indices[t, k]}(x[t])        over the k with slot_indices[t, k] >= 0
    Expert_s(x) = finish( activation(x W_up(s) + b_up(s)) W_down(s) + b_down(s) )

A pair (t, k) with slot -1 is dropped before any matrix product: an absent expert takes neither time nor memory.
`masked_experts_reference` is the specification in plain PyTorch; autograd derives its backward pass. The caller maps
experts to slots: routers and plans are unknown here. `masked_experts` computes the same with the fastest backend that
can run: on the CPU, `edgefed.kernels.native_experts`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from edgefed.kernels.cases import masked_experts_case
from edgefed.kernels.dispatch import Unsupported, choose, proved_in_training, run_best, want_proof
from edgefed.kernels.failures import watch_backward
from edgefed.kernels.neuron_energy import add_neuron_energy
from edgefed.kernels.quantization import QuantizedMatrix, dequantize_experts
from edgefed.kernels.row_sizes import row_product

IMPLEMENTATIONS = {
    "native": ("edgefed.kernels.native_experts", ("int8_activations", "keep_activations", "neuron_energy")),
    "triton": ("edgefed.triton_kernels.masked_experts", ("keep_activations", "finish", "neuron_energy")),
    "cuda": ("edgefed.kernels.cuda_experts", ()),
}
"""Module of each backend, with ``why_not``, ``masked_experts`` and ``Unsupported``, and the options it supports."""


ONE_WIDTH = ("triton", "cuda")
"""Backends that take slots of one width in a call: slices of different widths are computed width by width."""


@dataclasses.dataclass(frozen=True)
class LowRankPair:
    """A LoRA update of one weight: adds ``scale * (x A^T) B^T``. ``lora_a`` (R, in), ``lora_b`` (out, R)."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scale: float


@dataclasses.dataclass(frozen=True)
class SlotWeights:
    """The tensors of one expert.

    Each is a separate tensor, never a row of a stack indexed inside the graph: the backward pass of such an index
    writes a gradient as large as the whole stack, once per expert.

    ``up`` is gate_up_proj (2I, H), or up_proj (I, H) of an ungated expert; ``down`` is (H, I). Both are transposed if
    the layer ``is_transposed``. I may differ between the slots of a layer. Either may be quantized; such a weight is
    frozen, and is dequantized to its original dtype for products.
    """

    up: torch.Tensor | QuantizedMatrix
    down: torch.Tensor | QuantizedMatrix
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    up_lora: LowRankPair | None = None
    down_lora: LowRankPair | None = None


class Slots(Protocol):
    """S experts by slot. An item is read once per call, only if a token needs it: it may come from disk.

    With a true attribute ``streamed``, items are read one after the other and none stays in memory. Slots of different
    widths have an attribute ``widths``, (S,): the neurons of each. Slots that keep their tensors between calls have
    ``lasting``, and ``scheduled``: the slots whose tensors get gradients in this call, None for all.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, slot: int) -> SlotWeights: ...


@dataclasses.dataclass(frozen=True)
class LastingSlots:
    """Slots that keep their tensors, none of them detached, and what backends derive from them, by backend.

    Their owner clears ``layouts`` when it replaces a tensor; new values in the same tensor change nothing.
    """

    slots: Slots
    layouts: dict[str, Any] = dataclasses.field(default_factory=dict)


class _PackedProduct(torch.autograd.Function):
    """x (P, in) times a quantized weight, (P, out).

    The weight is unpacked again for the backward pass; autograd would keep it unpacked until then.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: QuantizedMatrix, is_transposed: bool) -> torch.Tensor:
        ctx.weight, ctx.is_transposed = weight, is_transposed
        values = dequantize_experts(weight, backend="reference")
        return row_product(x, values if is_transposed else values.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        values = dequantize_experts(ctx.weight, backend="reference")
        return row_product(dy, values.t() if ctx.is_transposed else values), None, None


_packed_product: Callable[..., torch.Tensor] = _PackedProduct.apply


def _project(
    x: torch.Tensor,  # (P, in)
    weight: torch.Tensor | QuantizedMatrix,
    bias: torch.Tensor | None,
    lora: LowRankPair | None,
    is_transposed: bool,
) -> torch.Tensor:
    if isinstance(weight, QuantizedMatrix):
        out = _packed_product(x, weight, is_transposed)  # (P, out)
    else:
        out = row_product(x, weight if is_transposed else weight.t())
    if bias is not None:
        out = out + bias
    if lora is not None:
        low = row_product(x, lora.lora_a.to(x.dtype).t())  # (P, R)
        out = out + row_product(low, lora.lora_b.to(x.dtype).t()) * lora.scale
    return out


def masked_experts(
    hidden_states: torch.Tensor,
    slot_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    slots: Slots,
    *,
    activation: Callable[[torch.Tensor], torch.Tensor],
    is_transposed: bool = False,
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
    backend: str = "auto",
    int8_activations: bool | None = None,
    keep_activations: bool | None = None,
    neuron_energy: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute the weighted sum of each token's resident experts.

    Args:
        hidden_states: (T, H) tokens x. Cast to the weights' dtype before the products, as in transformers.
        slot_indices: (T, K) int64 in [-1, S); -1 means no expert. A slot may occur twice in a row: its weights add up
            (merged experts).
        expert_weights: (T, K) floating point. The value of a dropped pair is not read and gets gradient 0.
        slots: the S experts.
        activation: maps the up projection, (P, 2I) or (P, I), to (P, I), row by row: the layer's gating.
        is_transposed: weights are (in, out) instead of (out, in).
        finish: applied to each expert's output (P, H) before the weighting. Backends other than the reference store the
            outputs of all T*K pairs for it, in the dtype of ``hidden_states``.
        backend: "reference", "native" (CPU), "triton" or "cuda" (GPU), or "auto": the fastest that is right here.
        int8_activations: multiply int8 weights with x rounded to 8 bits row by row, with exact integer sums. The error
            of x is at most max |x| / 254 of its row: about 1 % of an output. None: if no gradient is needed and the
            processor has VNNI. Native only; the reference never rounds.
        keep_activations: save the up projection (P, 2I) for the backward pass instead of computing it again. None: if
            it is smaller than the gradients of the trainable dense weights; never for a frozen layer. The reference
            always saves it.
        neuron_energy: (I,) accumulators, one per slot, to which the energies of this batch are added
            (`edgefed.kernels.neuron_energy`). Reference, native and Triton only.

    Returns (T, H) in the dtype of ``hidden_states``; zero for a token without a pair. Sums over k run in at least
    float32. Differentiable in hidden_states, expert_weights and all dense tensors of the slots with tokens; an expert
    without a token is outside the graph, so its gradient stays None. One host synchronization (counts). T = 0, S = 0
    and K = 0 are valid. Raises ValueError if shapes do not match, IndexError for a slot >= S, ConfigError if an
    explicit backend does not support this layer.

    """
    check_pairs(hidden_states, slot_indices, expert_weights)
    options = {
        "int8_activations": int8_activations,
        "keep_activations": keep_activations,
        "finish": finish,
        "neuron_energy": neuron_energy,
    }

    def run(name: str) -> torch.Tensor:
        if name == "reference":
            return masked_experts_reference(
                hidden_states, slot_indices, expert_weights, slots, activation=activation, is_transposed=is_transposed,
                finish=finish, neuron_energy=neuron_energy,
            )  # fmt: skip
        module, supported = IMPLEMENTATIONS[name]
        needed = ("neuron_energy",) if finish is None else ("neuron_energy", "finish")
        if neuron_energy is not None and not all(option in supported for option in needed):
            raise Unsupported("it does not record neuron energies of such a layer")
        implementation = importlib.import_module(module)
        watch_backward(implementation)
        reason = implementation.why_not(hidden_states, expert_weights, slots)
        if reason is not None:
            raise Unsupported(reason)
        function: Callable[..., torch.Tensor] = functools.partial(
            implementation.masked_experts, slots=slots, activation=activation, is_transposed=is_transposed,
            **{option: options[option] for option in supported},
        )  # fmt: skip
        widths = getattr(slots, "widths", ())
        if name in ONE_WIDTH and len(set(widths)) > 1:
            if neuron_energy is not None:
                raise Unsupported("it does not record neuron energies of slices of different widths")
            function = functools.partial(by_width, function, slots, widths)
        try:
            if finish is None or "finish" in supported:
                return function(hidden_states, slot_indices, expert_weights)
            return _finish_pairs(function, finish, hidden_states, slot_indices, expert_weights)
        except implementation.Unsupported as error:
            raise Unsupported(str(error)) from error

    case = functools.partial(
        masked_experts_case, hidden_states, slot_indices, slots, activation, is_transposed, finish, neuron_energy
    )
    device = str(hidden_states.device)
    if backend == "reference":
        want_proof("masked_experts", device, case)
    return run_best("masked_experts", device, backend, run, case=case)


def backend_for(
    device: str, dtype: torch.dtype, finish: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[str, str]:
    """Return the backend that "auto" trains a layer of ``dtype`` with, and why it is the reference ("" for another).

    On a GPU, that is one that is proved in every case of training that the device knows of. A layer with ``finish``
    trains with the reference: another backend would also store the outputs of all pairs.
    """
    name = choose("masked_experts", device)
    if name == "reference":
        name = proved_in_training(device, str(dtype).removeprefix("torch.")) or name
    if name == "reference":
        return name, "no other backend was chosen"
    probe = torch.empty(0, 1, dtype=dtype)
    reason = importlib.import_module(IMPLEMENTATIONS[name][0]).why_not(probe, probe, ())
    if finish is not None:
        reason = "the layer has an operation after its experts"
    return ("reference", f"not {name}: {reason}") if reason else (name, "")


@dataclasses.dataclass(frozen=True)
class _SomeSlots:
    """``members`` of ``slots``, in their order."""

    slots: Slots
    members: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, slot: int) -> SlotWeights:
        return self.slots[self.members[slot]]


def by_width(
    function: Callable[..., torch.Tensor],
    slots: Slots,
    widths: Sequence[int],
    hidden_states: torch.Tensor,
    slot_indices: torch.Tensor,
    expert_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute slots of different ``widths`` (S,) by a ``function`` that takes one width: a call and a sum for each.

    ``function(hidden_states, slot_indices, expert_weights, slots=...)`` is one of a backend. The sums of the widths are
    rounded to the dtype of ``hidden_states`` one by one.
    """
    total = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    for width in sorted(set(widths)):
        members = tuple(slot for slot, own in enumerate(widths) if own == width)
        place_of = torch.full((len(widths) + 1,), -1, dtype=torch.int64)
        place_of[list(members)] = torch.arange(len(members))  # the last entry is that of slot -1
        own_indices = place_of.to(slot_indices.device)[slot_indices]
        total = total + function(hidden_states, own_indices, expert_weights, slots=_SomeSlots(slots, members))
    return total.to(hidden_states.dtype)


def _finish_pairs(
    function: Callable[..., torch.Tensor],
    finish: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,  # (T, H)
    slot_indices: torch.Tensor,  # (T, K)
    expert_weights: torch.Tensor,  # (T, K)
) -> torch.Tensor:
    """Masked experts with an operation on each expert's output, by a ``function`` that lacks it.

    Every pair becomes a token with weight 1; the outputs are finished, weighted and added up here.
    """
    num_tokens, top_k = slot_indices.shape
    pairs = hidden_states.unsqueeze(1).expand(-1, top_k, -1).reshape(num_tokens * top_k, -1)  # (T*K, H)
    ones = torch.ones(num_tokens * top_k, 1, dtype=expert_weights.dtype, device=expert_weights.device)
    outputs = finish(function(pairs, slot_indices.reshape(-1, 1), ones))  # (T*K, H)
    at_least_float32 = torch.promote_types(hidden_states.dtype, torch.float32)
    dropped = slot_indices < 0
    weights = expert_weights.masked_fill(dropped, 0.0).to(at_least_float32)  # may be NaN
    rows = outputs.view(num_tokens, top_k, -1).masked_fill(dropped.unsqueeze(-1), 0.0)  # finish(0) need not be 0
    weighted = rows.to(at_least_float32) * weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def check_pairs(hidden_states: torch.Tensor, slot_indices: torch.Tensor, expert_weights: torch.Tensor) -> None:
    """Raise ValueError unless the shapes match."""
    if hidden_states.ndim != 2 or slot_indices.ndim != 2 or slot_indices.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"hidden_states {tuple(hidden_states.shape)} and slot_indices {tuple(slot_indices.shape)} "
            "must be (T, H) and (T, K)"
        )
    if slot_indices.shape != expert_weights.shape:
        raise ValueError(
            f"slot_indices {tuple(slot_indices.shape)} and expert_weights {tuple(expert_weights.shape)} differ"
        )


def masked_experts_reference(
    hidden_states: torch.Tensor,
    slot_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    slots: Slots,
    *,
    activation: Callable[[torch.Tensor], torch.Tensor],
    is_transposed: bool = False,
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
    neuron_energy: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The specification of `masked_experts`, in plain PyTorch."""
    check_pairs(hidden_states, slot_indices, expert_weights)
    top_k = slot_indices.shape[1]
    flat_slots = slot_indices.reshape(-1)  # (T*K,)
    pairs = (flat_slots >= 0).nonzero().squeeze(1)  # (P,) kept pairs
    order = torch.sort(flat_slots[pairs], stable=True)
    pairs = pairs[order.indices]  # (P,) sorted by slot
    tokens_per_slot = torch.bincount(order.values, minlength=len(slots)).tolist()  # the host synchronization
    if len(tokens_per_slot) > len(slots):
        raise IndexError(f"slot {len(tokens_per_slot) - 1} is out of range: there are {len(slots)} slots")
    tokens = pairs // max(top_k, 1)  # (P,)
    factors = expert_weights.reshape(-1)[pairs]  # (P,)
    inputs = hidden_states[tokens]  # (P, H)
    outputs = []
    start = 0
    for slot, count in enumerate(tokens_per_slot):
        if count == 0:
            continue
        weights = slots[slot]
        x = inputs[start : start + count].to(weights.up.dtype)
        up = activation(_project(x, weights.up, weights.up_bias, weights.up_lora, is_transposed))  # (count, I)
        if neuron_energy is not None:
            pair_weights = factors[start : start + count]
            add_neuron_energy(neuron_energy[slot], up, pair_weights, weights.down, is_transposed=is_transposed)
        down = _project(up, weights.down, weights.down_bias, weights.down_lora, is_transposed)  # (count, H)
        outputs.append(down if finish is None else finish(down))
        start += count
    accumulated = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    if outputs:
        weighted = torch.cat(outputs) * factors.unsqueeze(-1)  # (P, H)
        accumulated = accumulated.index_add(0, tokens, weighted.to(accumulated.dtype))
    return accumulated.to(hidden_states.dtype)
