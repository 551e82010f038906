"""Predicts the peak memory of a training step before anything is loaded. Arithmetic only: no torch, no model.

Symbols: H hidden_size, I expert_width, T tokens of a batch, V vocab_size, K experts per token, P (token, expert) pairs,
R LoRA rank, w bytes of a number. A step has four phases; its peak is the largest of them, not their sum:

    forward     weights + optimizer state + what the layers so far keep for the backward pass
    loss        the same of all layers + logits and their gradient
    backward    layer by layer from the last: kept tensors are freed, weight gradients are made
    optimizer   weights + optimizer state + all gradients + temporaries of the update of one tensor

What layers keep follows formulas (`edgefed.costs.activations`), which one measured step corrects
(`edgefed.training.calibration`). Weights, gradients and optimizer state are counted exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from edgefed.costs.activations import (
    Activations,
    activations,
    corrected,
    expert_bytes,
    forward_transient,
    gradient_bytes,
    outside_experts,
    rounded_up,
    score_bytes,
    static_bytes,
    trained_tensors,
    with_counts,
    workspace_bytes,
)
from edgefed.costs.shapes import ModelShape
from edgefed.costs.step_setup import (
    ADAPTER_BYTES,
    ALLOWANCE,
    DTYPE_BYTES,
    MEASURED_BYTES,
    STORAGE_BYTES,
    TRAINABLE_TOKENS,
    Correction,
    StepSetup,
)
from edgefed.errors import ConfigError

__all__ = [
    "ADAPTER_BYTES",
    "DTYPE_BYTES",
    "STORAGE_BYTES",
    "ComputeBudget",
    "Correction",
    "MemoryEstimate",
    "StepSetup",
    "compute_budget",
    "profiling_memory",
    "training_memory",
]

_MIB = 1024 * 1024
ATTENTION_BYTES = 32 * _MIB
"""A piece of attention weights and its copies: `edgefed.moe.attention_received`, PIECE_BYTES times PIECE_COPIES."""
PAUSED_HIDDEN, PAUSED_PER_EXPERT, PAUSED_PER_PAIR = 5.5, 8, 24
"""Per token of a batch that waits for the next layer: hidden states (counted: 4 in OLMoE, 5.5 in GPT-OSS), router
logits and the router's choice."""
PAUSED_BYTES = 6 * _MIB
"""Per thread of a waiting batch on a CPU: scratch of the matrix library, up to 4.6 MiB measured."""


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a step: ``parts`` of the peak, in display order, and the peak of each of its ``phases``."""

    parts: dict[str, int]
    phases: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return sum(self.parts.values())

    @property
    def phase(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=self.phases.__getitem__)


@dataclasses.dataclass(frozen=True)
class ComputeBudget:
    """How many experts per MoE layer fit, at most the number of the largest layer. 0: not even one.

    Attributes:
        profile_per_layer: Resident in a forward pass.
        resident_per_layer: Resident while one of them trains.
        trainable_per_layer: Resident while all of them train.
        estimate: Of the largest plan that fits (all trainable, else one), or of one expert per layer if none does.
        limit: A sentence about what limits the number.
        limits: The same for each number: profile, resident, trainable.
    """

    profile_per_layer: int
    resident_per_layer: int
    trainable_per_layer: int
    estimate: MemoryEstimate
    limit: str
    limits: dict[str, str]


def training_memory(
    shape: ModelShape,
    setup: StepSetup,
    resident: int | Sequence[int],
    trainable: int | Sequence[int],
    correction: Correction | None = None,
    *,
    measured: bool = False,
) -> MemoryEstimate:
    """Peak of a training step from the second on (the first has no optimizer state yet).

    Args:
        shape: The model.
        setup: How the step is done.
        resident: Experts in memory of each MoE layer, or one number for all; more than a layer has means all of it.
        trainable: Those of them that train.
        correction: What a measured step says about the formulas.
        measured: The step is measured, on a CPU: what was allocated in its backward pass is read before the optimizer.

    Raises:
        ConfigError: Negative counts, or more trainable than resident experts.
    """
    resident, trainable = _counts(shape, resident, trainable, setup)
    static = static_bytes(shape, setup, resident, trainable)
    gradients = gradient_bytes(shape, setup, trainable)
    states = static["optimizer"]
    base = sum(static.values())
    trainable_tokens = correction.trainable_tokens if correction else TRAINABLE_TOKENS
    found = corrected(activations(shape, setup, resident, trainable, trainable_tokens=trainable_tokens), correction)
    overhead = workspace_bytes(shape, setup) + (correction.overhead_bytes if correction else 0)
    lasting = gradient_bytes(shape, setup, trainable, lasting=True)
    moments = _moments(shape, setup, found, gradients, lasting)
    reading = _measured_bytes(setup, resident, trainable) if measured else 0
    moments["optimizer"] = (sum(lasting), max(reading, _optimizer_temporary(shape, setup, trainable)), 0)
    overhead += rounded_up(ALLOWANCE * (base + overhead + max(map(sum, moments.values()))))
    phases = {phase: base + sum(moment) + overhead for phase, moment in moments.items()}
    peak = moments[max(phases, key=phases.__getitem__)]
    parts = {
        "dense": static["dense"],
        "resident experts": static["resident experts"],
        "trainable experts": static["trainable experts"],
        "gradients": peak[0],
        "optimizer": states,
        "activations": peak[1],
        "logits": peak[2],
        "workspace": overhead,
    }
    return MemoryEstimate(parts, phases)


def _measured_bytes(setup: StepSetup, resident: Sequence[int], trainable: Sequence[int]) -> int:
    """Bytes of what is recorded of a measured step on a CPU, when it is read."""
    if setup.device != "cpu":
        return 0
    each, frozen = MEASURED_BYTES["lora" if setup.experts == "lora" else "full"]
    return sum(trainable) * each + (sum(resident) - sum(trainable)) * frozen


def _moments(
    shape: ModelShape, setup: StepSetup, found: Activations, gradients: Sequence[int], lasting: Sequence[int]
) -> dict[str, tuple[int, int, int]]:
    """(gradients, activations, logits) at the peak of the forward pass, the loss and the backward pass.

    ``lasting``: the gradients of each layer that remain after its backward pass.
    """
    kept = [outside + inside for outside, inside in zip(found.outside, found.inside, strict=True)]
    again = [0.0] * len(kept)
    if setup.checkpointing:  # only a layer's input is kept, the layer runs again in the backward pass
        again, hidden = kept, setup.tokens * shape.hidden_size * setup.width
        kept = [float(hidden)] * len(kept)
    body = sum(kept) + found.tail
    gone, cumulated, backward = 0, body, (0, 0, 0)
    for layer in range(len(kept) - 1, found.first - 1, -1):
        # The experts' tensors are freed as their gradients are made, except those that stay until the end.
        grown = max(0, gradients[layer] - int(max(0.0, found.inside[layer] - found.stays[layer])))
        backward = max(backward, (gone + grown, int(cumulated + again[layer] + found.backward[layer]), 0), key=sum)
        gone += lasting[layer]
        cumulated -= kept[layer]
    return {
        "forward": (0, int(body + max(found.forward)), 0),
        "loss": (0, int(body), int(found.loss)),
        "backward": backward,
    }


def _optimizer_temporary(shape: ModelShape, setup: StepSetup, trainable: Sequence[int]) -> int:
    """Temporaries of the optimizer step.

    Torch's AdamW makes two copies of the tensor that it updates and still has one of the previous tensor; the fused
    implementation makes none. An 8-bit one that rounds weights in 16 bits stochastically has the weight, its gradient
    and noise in 32 bits.
    """
    if setup.device != "cpu" if setup.optimizer == "adamw" else setup.width > 2:
        return 0
    largest = 0
    for layer, count in with_counts(shape, trainable):
        expert, rest = trained_tensors(layer, setup)
        largest = max([largest, *(n * w for n, w in (expert if count else []) + rest)])
    return (3 if setup.optimizer == "adamw" else 6) * largest


CHOICE_BYTES = 64
"""For each neuron of a model whose slices are chosen: two sums of energies, scores, their order, masks."""


def profiling_memory(
    shape: ModelShape,
    setup: StepSetup,
    resident: int | Sequence[int],
    *,
    residency: str = "all",
    concurrent_batches: int = 1,
    attention: bool = False,
    energies: int = 0,
    threads: int = 1,
) -> MemoryEstimate:
    """Peak of the forward pass of an activation profile: no gradients, one row of logits per sequence.

    Args:
        shape: The model.
        setup: Batch size, sequence length and how experts are stored.
        resident: Experts per MoE layer.
        residency: In memory at a time: "all" of these, those of one "layer", or one "expert" of full layers in the
            model's dtype (`edgefed.moe.lockstep`).
        concurrent_batches: Batches side by side, of which all but one wait.
        attention: The attention that tokens receive is recorded.
        energies: Sets of energies of all neurons that are recorded, in float32. A choice of neurons from them takes
            `CHOICE_BYTES` for each.
        threads: Threads of the CPU.
    """
    resident, _ = _counts(shape, resident, 0, setup)
    storage = setup.expert_storage if residency != "expert" else None
    setup = dataclasses.replace(
        setup, experts="lora" if setup.experts == "lora" else "none", attention="none", expert_storage=storage
    )
    static = static_bytes(shape, setup, resident, tuple(0 for _ in resident))
    sizes = [expert_bytes(layer, setup) for layer in shape.moe_layers]
    read = max(
        expert_bytes(layer, setup, setup.dtype) for layer in shape.moe_layers
    )  # one expert, in the model's dtype
    experts: float = 0
    if residency == "all":
        experts = static["resident experts"]
    elif residency == "layer":
        experts = max(size * count for size, count in zip(sizes, resident, strict=True))
        experts *= 1 if setup.device == "cpu" else 2  # the next layer is loaded while one computes
    flowing, pairs = 0.0, iter(resident)
    for layer in shape.layers:
        count = next(pairs) if layer.num_experts else 0
        active = setup.tokens * min(layer.top_k, layer.num_experts if residency == "expert" else count)
        flowing = max(flowing, forward_transient(shape, layer, setup, active) + outside_experts(shape, layer, setup))
    if attention:
        flowing += ATTENTION_BYTES + 2 * setup.tokens * setup.sequence_length * setup.width
    waiting = _waiting_bytes(shape, setup, attention, threads) if concurrent_batches > 1 else 0
    parts = {
        "dense": static["dense"],
        "resident experts": rounded_up(experts + (0 if residency == "all" and storage is None else read)),
        "activations": int(flowing),
        "waiting batches": (concurrent_batches - 1) * waiting,
        "logits": setup.batch_size * shape.vocab_size * setup.width,
        "workspace": workspace_bytes(shape, setup),
    }
    if energies:
        neurons = sum(layer.num_experts * layer.expert_width for layer in shape.moe_layers)
        parts["neuron energies"] = (4 * energies + CHOICE_BYTES) * neurons
    return MemoryEstimate(parts, {"forward": sum(parts.values())})


def _waiting_bytes(shape: ModelShape, setup: StepSetup, attention: bool, threads: int) -> int:
    """What one batch keeps while it waits: hidden states, attention mask, and scores if its attention keeps them."""
    tokens, hidden = setup.tokens, PAUSED_HIDDEN * shape.hidden_size * setup.width
    routed = max(PAUSED_PER_EXPERT * layer.num_experts + PAUSED_PER_PAIR * layer.top_k for layer in shape.moe_layers)
    size = tokens * (hidden + routed) + (PAUSED_BYTES * threads if setup.device == "cpu" else 0)
    if attention or shape.masks:
        size += 2 * tokens * setup.sequence_length * setup.width
    if not attention:  # its pieces are gone
        size += max(score_bytes(shape, layer, setup) for layer in shape.layers)
    return int(size)


def compute_budget(
    shape: ModelShape, setup: StepSetup, usable_bytes: int, correction: Correction | None = None
) -> ComputeBudget:
    """How many experts per MoE layer fit into ``usable_bytes``; see `ComputeBudget`."""
    room = usable_bytes - (correction.process_bytes if correction else 0)
    most = shape.num_experts

    def training(resident: int, trainable: int) -> MemoryEstimate:
        return training_memory(shape, setup, resident, trainable, correction)

    trains = int(setup.experts != "none")
    estimates: dict[str, Callable[[int], MemoryEstimate]] = {
        "profile": lambda resident: profiling_memory(shape, setup, resident),
        "resident": lambda resident: training(resident, trains),
        "trainable": lambda resident: training(resident, resident),
    }
    found = {name: _largest(most, estimate, room) for name, estimate in estimates.items()}
    if not trains:
        found["trainable"] = 0
    limits = {name: _limit(found[name], most, estimate, room) for name, estimate in estimates.items()}
    if not trains:
        limits["trainable"] = "no expert trains in this run"
    return ComputeBudget(
        profile_per_layer=found["profile"],
        resident_per_layer=found["resident"],
        trainable_per_layer=found["trainable"],
        estimate=estimates["trainable"](found["trainable"])
        if found["trainable"]
        else estimates["resident"](max(1, found["resident"])),
        limit=limits["trainable" if trains else "resident"],
        limits=limits,
    )


def _limit(count: int, most: int, estimate: Callable[[int], MemoryEstimate], room: int) -> str:
    """A sentence: why one more than ``count`` does not fit."""
    if count == most:
        return f"nothing: all {most} experts of a layer fit"
    beyond = estimate(count + 1)
    largest = max(beyond.parts, key=beyond.parts.__getitem__)
    experts = "one expert" if count == 0 else f"{count + 1} experts"
    return (
        f"{experts} per layer would need {_mib(beyond.total_bytes)} at the peak ({beyond.phase}), {_mib(room)} are "
        f"usable; most of it is {largest} ({_mib(beyond.parts[largest])})"
    )


def _largest(most: int, estimate: Callable[[int], MemoryEstimate], room: int) -> int:
    """The largest count in 1..most whose estimate fits, 0 if none does. Estimates grow with the count."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if estimate(middle).total_bytes <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _counts(
    shape: ModelShape, resident: int | Sequence[int], trainable: int | Sequence[int], setup: StepSetup
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    per_layer = shape.experts_per_layer

    def spread(counts: int | Sequence[int], name: str) -> tuple[int, ...]:
        if isinstance(counts, int):
            counts = [counts] * len(per_layer)
        if len(counts) != len(per_layer) or min(counts, default=0) < 0:
            raise ConfigError(
                f"{name} experts of {len(per_layer)} MoE layers are needed, none negative; found {list(counts)}"
            )
        return tuple(min(int(count), limit) for count, limit in zip(counts, per_layer, strict=True))

    resident, trainable = spread(resident, "resident"), spread(trainable, "trainable")
    if any(t > k for k, t in zip(resident, trainable, strict=True)):
        raise ConfigError(
            "trainable experts must be resident; "
            f"found {list(trainable)} trainable of {list(resident)} resident experts per layer"
        )
    return resident, trainable if setup.experts != "none" else tuple(0 for _ in trainable)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:.1f} MiB"
