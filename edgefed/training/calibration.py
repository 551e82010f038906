"""Measures one training step: what the allocator held in each phase, and how far the memory model's formulas are off.

Hooks mark the progress of the step: a layer's experts begin and end, the decoder is done, the gradient of a layer's
output exists, the optimizer starts. `edgefed.training.allocation_log` reads the allocator at every mark: CUDA's own
counters, or the profiler's events on a CPU, whose running sum between marks is the same number. Both count the bytes
of tensors, including temporaries inside operations; what the process takes beyond that is read separately (VmHWM).

The step's result does not depend on being measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.hooks import RemovableHandle

from edgefed.costs.activations import activations, workspace_bytes
from edgefed.costs.shapes import ModelShape
from edgefed.costs.step_setup import TRAINABLE_TOKENS, Correction, StepSetup
from edgefed.hardware.memory import reset_peak_rss, status_bytes, trim_memory
from edgefed.moe.accounting import gradients, storage_bytes
from edgefed.moe.model import MoeModel
from edgefed.moe.model_shape import decoder_layer_paths
from edgefed.moe.offloading import offloaded
from edgefed.training.allocation_log import OPTIMIZER_MARK, AllocationLog, CpuLog, CudaLog, Span


@dataclasses.dataclass(frozen=True)
class StepMeasurement:
    """Bytes of one step; of the allocator, except ``process_bytes``.

    Attributes:
        device: Where the step ran.
        phases: Most held in forward, loss, backward and optimizer, including weights and optimizer state.
        weight_bytes: Weights before the step.
        state_bytes: Optimizer state before the step, 0 in a first one.
        other_bytes: Anything else before the step; on a GPU for example cuBLAS's workspace.
        saved_bytes: What the decoder kept for the backward pass when it was done.
        expert_saved_bytes: Per MoE layer, the part of it inside the experts, or what was when the layer ran again.
        again_bytes: What each decoder layer kept that ran again (checkpointing).
        backward: (decoder layer, bytes when its gradient came, peak until the next layer's came).
        gradient_bytes: Gradients per decoder layer.
        flows_in: Gradients flow into the first layer.
        resident: Experts in memory per MoE layer.
        trainable: Those of them that train.
        trainable_share: Share of each MoE layer's (token, expert) pairs that trainable experts computed.
        busier_share: Share that the busier half of its experts computed.
        process_bytes: What the process grew by beyond the allocator's peak, but for reading events; None if unknown.
        process_note: Why it is unknown.
        seconds: Of the step.
    """

    device: str
    phases: dict[str, int]
    weight_bytes: int
    state_bytes: int
    other_bytes: int
    saved_bytes: int
    expert_saved_bytes: tuple[int, ...]
    again_bytes: dict[int, int]
    backward: tuple[tuple[int, int, int], ...]
    gradient_bytes: dict[int, int]
    flows_in: bool
    resident: tuple[int, ...]
    trainable: tuple[int, ...]
    trainable_share: tuple[float, ...]
    busier_share: tuple[float, ...]
    process_bytes: int | None
    process_note: str
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """The most held in any phase."""
        return max(self.phases.values())


def can_measure(setup: StepSetup) -> bool:
    """Whether a measured step can correct the formulas.

    It cannot for experts offloaded from a GPU: their copies look like what a layer keeps.
    """
    return not (setup.offload and setup.device != "cpu")


def measure_step(model: MoeModel, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> StepMeasurement:
    """Run ``step`` once (forward, loss, backward, ``optimizer.step()``) and measure its memory.

    The model has a plan and no gradients. Raises what ``step`` raises, after removing the hooks.
    """
    device = next(iter(model.module.parameters())).device
    log: AllocationLog = CudaLog(device) if device.type == "cuda" else CpuLog()
    offloads = model.offloads or bool(model.streamed_layers)
    tensors = (*model.module.parameters(), *model.module.buffers())
    weights = storage_bytes(tensor for tensor in tensors if not offloaded(tensor))
    state = storage_bytes(_state_tensors(optimizer))
    served_before, trained_before = model.served_tokens(), model.trained_tokens()
    gc.collect()  # older garbage would be freed within the step, and torch would warn of it
    clears, rss_before = reset_peak_rss(), status_bytes("VmRSS")
    started = time.perf_counter()
    facts = _Facts()
    anonymous: list[int] = []  # of the process, at each mark: it does not need the pages of mapped files

    def mark(name: str) -> None:
        if offloads:
            anonymous.append(status_bytes("RssAnon") or 0)
        log.mark(name)

    with log, _marks(model, optimizer, mark, facts), set_checkpoint_early_stop(False):
        step()
    seconds = time.perf_counter() - started
    if device.type == "cpu":
        trim_memory()
    spans = log.spans()
    peak = max(span.peak_bytes for span in spans)
    process, note = None, "the kernel does not let this process reset its peak (/proc/self/clear_refs)"
    if device.type != "cpu":
        note = "the step's memory is the GPU's"
    elif offloads and all(anonymous):
        grown = (now - anonymous[0] - span.start_bytes for now, span in zip(anonymous, spans, strict=False))
        process, note = max(0, *grown), ""
    elif clears and rss_before is not None and log.high_water_bytes is not None:
        process, note = max(0, log.high_water_bytes - rss_before - peak), ""
    num_layers = len(model.layers)
    served = _tokens(served_before, model.served_tokens(), num_layers)
    trained = _tokens(trained_before, model.trained_tokens(), num_layers)
    other = max(0, log.before_bytes - weights - state)
    plan, parts = model.plan, _read_spans(spans, weights + state + other)
    assert plan is not None, "a plan is applied"
    return StepMeasurement(
        device=str(device),
        phases=parts.phases,
        weight_bytes=weights,
        state_bytes=state,
        other_bytes=other,
        saved_bytes=parts.saved_bytes,
        expert_saved_bytes=tuple(parts.expert_saved_bytes[layer] for layer in range(num_layers)),
        again_bytes=parts.again_bytes,
        backward=tuple(parts.backward),
        gradient_bytes=facts.gradient_bytes,
        flows_in=bool(facts.flows_in),
        resident=tuple(plan.num_slots(layer) for layer in range(num_layers)),
        trainable=tuple(len(plan.trainable(layer)) for layer in range(num_layers)),
        trainable_share=tuple(sum(t) / max(1, sum(s)) for s, t in zip(served, trained, strict=True)),
        busier_share=tuple(sum(tokens[: len(tokens) - len(tokens) // 2]) / max(1, sum(tokens)) for tokens in served),
        process_bytes=process,
        process_note=note,
        seconds=seconds,
    )


def correction_from(measurement: StepMeasurement, shape: ModelShape, setup: StepSetup) -> Correction:
    """How far the formulas for ``setup`` are off, from a step with this setup."""
    raw = activations(
        shape,
        setup,
        measurement.resident,
        measurement.trainable,
        measurement.trainable_share,
        flows_in=measurement.flows_in,
    )
    base = measurement.weight_bytes + measurement.state_bytes + measurement.other_bytes
    inside = sum(measurement.expert_saved_bytes)
    if setup.checkpointing:
        outside: float = sum(measurement.again_bytes.values()) - inside
    else:
        outside = measurement.saved_bytes - inside - raw.tail
    transients = []
    moe = [index for index, layer in enumerate(shape.layers) if layer.num_experts]
    for layer, start, peak in measurement.backward:
        kept = measurement.expert_saved_bytes[moe.index(layer)] if layer in moe else 0
        gone = int(max(0.0, kept - raw.stays[layer]))
        grown = max(0, measurement.gradient_bytes.get(layer, 0) - gone)
        again = measurement.again_bytes.get(layer, 0)
        transients.append((peak - start - grown - again) / raw.backward[layer])
    # Layers that keep nothing have temporaries that others count as kept, so their forward pass says nothing.
    forward = measurement.phases["forward"] - base - measurement.saved_bytes
    return Correction(
        activation_scale=_ratio(outside - sum(raw.scores), sum(raw.outside) - sum(raw.scores)),
        # The formula counts the workspace already.
        overhead_bytes=measurement.other_bytes - (workspace_bytes(shape, setup) if measurement.other_bytes else 0),
        origin=f"one step of {setup.batch_size} x {setup.sequence_length} tokens, measured on {measurement.device}",
        expert_scale=_ratio(inside, sum(raw.inside)),
        loss_scale=_ratio(measurement.phases["loss"] - base - measurement.saved_bytes, raw.loss),
        transient_scale=max(0.0, *transients),
        forward_scale=1.0 if setup.checkpointing else _ratio(forward, max(raw.forward)),
        trainable_tokens=_trainable_tokens(measurement),
        process_bytes=measurement.process_bytes or 0,
        kernels=setup.kernels,
    )


def _trainable_tokens(measurement: StepMeasurement) -> float:
    """Tokens of trainable experts as a multiple of an even share, at most `TRAINABLE_TOKENS`; the mean over layers.

    Of the step's own trainable experts, or of the busier half of all resident ones, whichever is more.
    """
    factors = []
    for resident, trainable, share, busier in zip(
        measurement.resident, measurement.trainable, measurement.trainable_share, measurement.busier_share, strict=True
    ):
        if resident > 1:
            half = resident - resident // 2
            factors.append(max(busier * resident / half, share * resident / trainable if trainable else 0.0))
    return min(TRAINABLE_TOKENS, sum(factors) / len(factors)) if factors else TRAINABLE_TOKENS


def _ratio(measured: float, formula: float) -> float:
    return max(0.0, measured) / formula if formula else 1.0


# --- marks ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Facts:
    """What hooks learn beside bytes. ``gradient_bytes`` per decoder layer; ``flows_in``: into the first of them."""

    gradient_bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    flows_in: bool | None = None


@contextlib.contextmanager
def _marks(
    model: MoeModel, optimizer: torch.optim.Optimizer, mark: Callable[[str], None], facts: _Facts
) -> Iterator[None]:
    """Within it ``mark`` is called with a name wherever a phase or a layer begins or ends, and ``facts`` are set."""
    handles: list[RemovableHandle] = []
    decoder = model.module.base_model
    loss_began = False

    def again() -> str:
        return "again-" if torch._C._current_graph_task_id() != -1 else ""

    def decoder_done(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal loss_began
        if not loss_began:  # a chunked loss calls the emptied decoder again for its head
            loss_began = True
            mark("loss")

    def layer_starts(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = (*args, *kwargs.values())
        found = any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs)
        if facts.flows_in is None:
            facts.flows_in = found

    def child_done(index: int) -> None:
        if again():
            mark(f"again-end:{index}")

    def layer_done(index: int, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor) and first.requires_grad and not again():
            first.register_hook(lambda gradient: mark(f"backward:{index}"))  # type: ignore[no-untyped-call]

    for index, path in enumerate(decoder_layer_paths(model.module, model.layers)):
        layer = model.module.get_submodule(path)
        handles.append(layer.register_forward_hook(lambda m, a, out, i=index: layer_done(i, out)))
        handles.append(layer.register_forward_pre_hook(layer_starts, with_kwargs=True))
        for child in layer.children():  # the layer's own hooks do not run again with it
            handles.append(child.register_forward_hook(lambda m, a, out, i=index: child_done(i)))
    for moe_layer in model.layers:
        i, experts = moe_layer.ordinal, moe_layer.experts
        handles.append(experts.register_forward_pre_hook(lambda m, a, i=i: mark(f"{again()}experts:{i}")))
        handles.append(experts.register_forward_hook(lambda m, a, out, i=i: mark(f"{again()}experts-end:{i}")))
    assert isinstance(decoder, nn.Module), "a transformers model has a decoder"
    handles.append(decoder.register_forward_hook(decoder_done))

    def optimizer_starts(*args: object) -> None:
        mark(OPTIMIZER_MARK)
        facts.gradient_bytes = _gradient_bytes(model)

    handles.append(optimizer.register_step_pre_hook(optimizer_starts))
    try:
        mark("forward")
        yield
        mark("end")
    finally:
        for handle in handles:
            handle.remove()


@dataclasses.dataclass
class _Parts:
    """The fields of `StepMeasurement` that spans give."""

    phases: dict[str, int]
    saved_bytes: int = 0
    expert_saved_bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    again_bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    backward: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)


def _read_spans(spans: list[Span], base: int) -> _Parts:
    """Put the spans together. ``base``: bytes before the step."""
    parts = _Parts({"forward": 0, "loss": 0, "backward": 0, "optimizer": 0})
    phase, experts = "forward", parts.expert_saved_bytes
    for span in spans:
        kind, _, number = span.name.partition(":")
        if kind == "loss":
            phase, parts.saved_bytes = "loss", span.start_bytes
        elif kind == "backward":
            phase = "backward"
            parts.backward.append((int(number), span.start_bytes, span.peak_bytes))
        elif kind == "optimizer":
            phase = "optimizer"
        elif kind == "again-end":
            parts.again_bytes[int(number)] = span.start_bytes - parts.backward[-1][1]  # the last child's end counts
        elif kind.endswith("experts"):
            experts[int(number)] = -span.start_bytes
        elif kind.endswith("experts-end"):  # a layer that runs again comes later and replaces its first pass
            experts[int(number)] += span.start_bytes
        parts.phases[phase] = max(parts.phases[phase], base + span.peak_bytes)
        if phase == "backward":
            layer, start, peak = parts.backward[-1]
            parts.backward[-1] = layer, start, max(peak, span.peak_bytes)
    return parts


def _tokens(before: dict[tuple[int, int], int], after: dict[tuple[int, int], int], layers: int) -> list[list[int]]:
    """Tokens of each expert of each MoE layer between two counts, most first."""
    counts: list[list[int]] = [[] for _ in range(layers)]
    for (layer, expert), tokens in after.items():
        counts[layer].append(tokens - before[layer, expert])
    return [sorted(layer, reverse=True) for layer in counts]


def _gradient_bytes(model: MoeModel) -> dict[int, int]:
    """Gradient bytes per decoder layer, as they are now."""
    sizes = {}
    for index, path in enumerate(decoder_layer_paths(model.module, model.layers)):
        parameters = [p for p in model.module.get_submodule(path).parameters() if p.grad is not None]
        sizes[index] = storage_bytes(gradients(parameters))
        sizes[index] += sum(p.grad.nbytes for p in parameters if p.grad is not None and offloaded(p))
    return sizes


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for parameter, state in optimizer.state.items():
        if offloaded(parameter):
            continue
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
