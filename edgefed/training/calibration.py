"""One training step, measured: what the allocator held in each phase, and how far the memory model's formulas are off.

Hooks mark where the step is: a layer's experts begin and end, the decoder is done, the gradient of a layer's output is
there, the optimizer starts. On CUDA the allocator is read at every mark. The CPU allocator keeps no peak, but the
profiler sees its events: their running sum between marks is the same number. Both count what tensors take, temporaries
inside operations included; what the process takes beyond that is read apart (VmHWM).

The step runs as always; nothing of its result depends on being measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import set_checkpoint_early_stop

from edgefed.costs.activations import activations, workspace_bytes
from edgefed.costs.shapes import ModelShape, decoder_layer_paths
from edgefed.costs.step_setup import TUNED_TOKENS, Correction, StepSetup
from edgefed.moe.accounting import gradients, storage_bytes
from edgefed.moe.model import MoeModel
from edgefed.moe.offloading import offloaded


@dataclasses.dataclass(frozen=True)
class StepMeasurement:
    """Bytes of one step; all are the allocator's but ``process_bytes``.

    ``phases`` maps forward, loss, backward and optimizer to the most held in them, weights and state included.
    ``weight_bytes`` and ``state_bytes`` were there before (no state in a first step), and on a GPU ``other_bytes``,
    cuBLAS's workspace for one. ``kept_bytes`` is what the decoder had kept when it was done; ``expert_kept_bytes`` per
    MoE layer what of it is inside the experts, or was when the layer ran again (checkpointing); ``again_bytes`` what
    each layer that ran again kept. ``backward`` lists (decoder layer, bytes when its gradient came, peak until the next
    one's came). ``flows_in``: gradients flow into the first layer. ``trainable_share``: part of each MoE layer's (token,
    expert) pairs that trainable experts computed; ``busier_share``: that the busier half of its experts did.
    ``process_bytes``: what the process grew by beyond the allocator's peak, what measuring took included; None with
    the reason in ``process_note``.
    """

    device: str
    phases: dict[str, int]
    weight_bytes: int
    state_bytes: int
    other_bytes: int
    kept_bytes: int
    expert_kept_bytes: tuple[int, ...]
    again_bytes: dict[int, int]
    backward: tuple[tuple[int, int, int], ...]
    gradient_bytes: dict[int, int]
    flows_in: bool
    kept: tuple[int, ...]
    trainable: tuple[int, ...]
    trainable_share: tuple[float, ...]
    busier_share: tuple[float, ...]
    process_bytes: int | None
    process_note: str
    seconds: float

    @property
    def peak_bytes(self) -> int:
        return max(self.phases.values())


def can_measure(setup: StepSetup) -> bool:
    """Whether a measured step says something of the formulas: copies of offloaded experts on a GPU look like what a
    layer keeps.
    """
    return not (setup.offload and setup.device != "cpu")


def measure_step(model: MoeModel, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> StepMeasurement:
    """Run ``step`` (forward, loss, backward, ``optimizer.step()``, once) and read what it takes.

    The model has a plan applied and no gradients. Whatever ``step`` raises passes through, the hooks gone.
    """
    device = next(iter(model.module.parameters())).device
    log = CudaLog(device) if device.type == "cuda" else CpuLog()
    offloads = any(offloaded(parameter) for parameter in model.module.parameters())
    here = [parameter for parameter in model.module.parameters() if not offloaded(parameter)]
    weights = storage_bytes((*here, *model.module.buffers()))
    state = storage_bytes(_state_tensors(optimizer))
    served, trained = model.served_tokens(), model.trained_tokens()
    gc.collect()  # what lies about from before would be freed within the step, and torch would warn of it
    clears, rss_before = _reset_peak_rss(), _status_bytes("VmRSS")
    started = time.perf_counter()
    facts: dict = {}
    anonymous: list[int] = []  # of the process, at each mark: pages of mapped files are no memory that it needs

    def mark(name: str) -> None:
        if offloads:
            anonymous.append(_status_bytes("RssAnon") or 0)
        log.mark(name)

    with log, _marks(model, optimizer, mark, facts), set_checkpoint_early_stop(False):
        step()
    seconds = time.perf_counter() - started
    spans = log.spans()
    served = _tokens(served, model.served_tokens(), len(model.layers))
    trained = _tokens(trained, model.trained_tokens(), len(model.layers))
    peak = max(span.peak_bytes for span in spans)
    process, note = None, "the kernel does not let this process reset its peak (/proc/self/clear_refs)"
    if device.type != "cpu":
        note = "the step's memory is the GPU's"
    elif offloads and all(anonymous):
        grown = (now - anonymous[0] - span.start_bytes for now, span in zip(anonymous, spans, strict=False))
        process, note = max(0, *grown), ""
    elif clears and rss_before is not None:
        process, note = max(0, _status_bytes("VmHWM") - rss_before - peak), ""
    other = max(0, log.before_bytes - weights - state)
    return _read(
        model,
        spans,
        facts,
        (weights, state, other),
        (served, trained),
        device=str(device),
        process_bytes=process,
        process_note=note,
        seconds=seconds,
    )


def correction_from(measurement: StepMeasurement, shape: ModelShape, setup: StepSetup) -> Correction:
    """How far the formulas for ``setup`` are off, from a step that was made so."""
    raw = activations(
        shape,
        setup,
        measurement.kept,
        measurement.trainable,
        measurement.trainable_share,
        flows_in=measurement.flows_in,
    )
    base = measurement.weight_bytes + measurement.state_bytes + measurement.other_bytes
    inside = sum(measurement.expert_kept_bytes)
    if setup.checkpointing:
        outside = sum(measurement.again_bytes.values()) - inside
    else:
        outside = measurement.kept_bytes - inside - raw.tail
    transients = []
    moe = [index for index, layer in enumerate(shape.layers) if layer.num_experts]
    for layer, start, peak in measurement.backward:
        kept = measurement.expert_kept_bytes[moe.index(layer)] if layer in moe else 0
        gone = int(max(0.0, kept - raw.stays[layer]))
        grown = max(0, measurement.gradient_bytes.get(layer, 0) - gone)
        again = measurement.again_bytes.get(layer, 0)
        transients.append((peak - start - grown - again) / raw.backward[layer])
    # Layers that keep nothing show on their way forward what others count as kept: no measure of those.
    forward = measurement.phases["forward"] - base - measurement.kept_bytes
    return Correction(
        activation_scale=_ratio(outside - sum(raw.scores), sum(raw.outside) - sum(raw.scores)),
        # Of what else was there the formula knows the workspace already.
        overhead_bytes=measurement.other_bytes - (workspace_bytes(shape, setup) if measurement.other_bytes else 0),
        origin=f"one step of {setup.batch_size} x {setup.sequence_length} tokens, measured on {measurement.device}",
        expert_scale=_ratio(inside, sum(raw.inside)),
        loss_scale=_ratio(measurement.phases["loss"] - base - measurement.kept_bytes, raw.loss),
        transient_scale=max(0.0, *transients),
        forward_scale=1.0 if setup.checkpointing else _ratio(forward, max(raw.forward)),
        trainable_tokens=_trainable_tokens(measurement),
        process_bytes=measurement.process_bytes or 0,
        kernels=setup.kernels,
    )


def _trainable_tokens(measurement: StepMeasurement) -> float:
    """Tokens that trainable experts get, as a multiple of what their number would get, at most twice: of the step's own
    trainable experts, or of the busier half of all that were there, whichever is more. The mean over layers.
    """
    factors = []
    for kept, trainable, share, busier in zip(
        measurement.kept, measurement.trainable, measurement.trainable_share, measurement.busier_share, strict=True
    ):
        if kept > 1:
            half = kept - kept // 2
            factors.append(max(busier * kept / half, share * kept / trainable if trainable else 0.0))
    return min(TUNED_TOKENS, sum(factors) / len(factors)) if factors else TUNED_TOKENS


def _ratio(measured: float, formula: float) -> float:
    return max(0.0, measured) / formula if formula else 1.0


# --- where a step is -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _marks(
    model: MoeModel, optimizer: torch.optim.Optimizer, mark: Callable[[str], None], facts: dict
) -> Iterator[None]:
    """Within it ``mark`` is called with a name wherever a phase or a layer begins or ends; ``facts`` gets the
    gradient bytes of each decoder layer, and whether gradients flow into the first.
    """
    handles = []
    decoder = model.module.base_model
    loss_began = False

    def again() -> str:
        return "again-" if torch._C._current_graph_task_id() != -1 else ""

    def decoder_done(module: nn.Module, args: tuple, output: object) -> None:
        nonlocal loss_began
        if not loss_began:  # a chunked loss calls the emptied decoder again for its head
            loss_began = True
            mark("loss")

    def layer_starts(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = (*args, *kwargs.values())
        found = any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs)
        facts.setdefault("flows_in", found)

    def child_done(index: int) -> None:
        if again():
            mark(f"again-end:{index}")

    def layer_done(index: int, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor) and first.requires_grad and not again():
            first.register_hook(lambda gradient: mark(f"backward:{index}"))

    for index, path in enumerate(decoder_layer_paths(model.module, model.layers)):
        layer = model.module.get_submodule(path)
        handles.append(layer.register_forward_hook(lambda m, a, out, i=index: layer_done(i, out)))
        handles.append(layer.register_forward_pre_hook(layer_starts, with_kwargs=True))
        for child in layer.children():  # the layer's own hooks do not run again with it
            handles.append(child.register_forward_hook(lambda m, a, out, i=index: child_done(i)))
    for layer in model.layers:
        i = layer.ordinal
        handles.append(layer.experts.register_forward_pre_hook(lambda m, a, i=i: mark(f"{again()}experts:{i}")))
        handles.append(layer.experts.register_forward_hook(lambda m, a, out, i=i: mark(f"{again()}experts-end:{i}")))
    handles.append(decoder.register_forward_hook(decoder_done))

    def optimizer_starts(*args: object) -> None:
        mark("optimizer")
        facts["gradients"] = _gradient_bytes(model)

    handles.append(optimizer.register_step_pre_hook(optimizer_starts))
    try:
        mark("forward")
        yield
        mark("end")
    finally:
        for handle in handles:
            handle.remove()


def _read(
    model: MoeModel,
    spans: list[Span],
    facts: dict,
    held: tuple[int, int, int],
    tokens: tuple[list[list[int]], list[list[int]]],
    **known: object,
) -> StepMeasurement:
    """Put the spans together. ``held``: bytes of weights, state and others before; ``tokens``: served and trained."""
    (weights, state, other), (served, trained) = held, tokens
    base = sum(held)
    phases = {"forward": 0, "loss": 0, "backward": 0, "optimizer": 0}
    phase, kept_bytes = "forward", 0
    experts: dict[int, int] = {}
    again: dict[int, int] = {}
    backward: list[list[int]] = []
    for span in spans:
        kind, _, number = span.name.partition(":")
        if kind == "loss":
            phase, kept_bytes = "loss", span.start_bytes
        elif kind == "backward":
            phase = "backward"
            backward.append([int(number), span.start_bytes, span.peak_bytes])
        elif kind == "optimizer":
            phase = "optimizer"
        elif kind == "again-end":
            again[int(number)] = span.start_bytes - backward[-1][1]  # its last part's end stays
        elif kind.endswith("experts"):
            experts[int(number)] = -span.start_bytes
        elif kind.endswith("experts-end"):  # what runs again comes later and replaces a first pass that kept nothing
            experts[int(number)] += span.start_bytes
        phases[phase] = max(phases[phase], base + span.peak_bytes)
        if phase == "backward":
            backward[-1][2] = max(backward[-1][2], span.peak_bytes)
    plan = model.plan
    layers = range(len(model.layers))
    return StepMeasurement(
        phases=phases,
        weight_bytes=weights,
        state_bytes=state,
        other_bytes=other,
        kept_bytes=kept_bytes,
        expert_kept_bytes=tuple(experts[i] for i in layers),
        again_bytes=again,
        backward=tuple(tuple(entry) for entry in backward),
        gradient_bytes=facts["gradients"],
        flows_in=facts["flows_in"],
        kept=tuple(plan.num_slots(i) for i in layers),
        trainable=tuple(len(plan.trainable(i)) for i in layers),
        trainable_share=tuple(sum(trained[i]) / max(1, sum(served[i])) for i in layers),
        busier_share=tuple(
            sum(served[i][: len(served[i]) - len(served[i]) // 2]) / max(1, sum(served[i])) for i in layers
        ),
        **known,
    )


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
        parameters = model.module.get_submodule(path).parameters()
        found = [p for p in parameters if p.grad is not None]
        sizes[index] = storage_bytes(gradients(found))
        sizes[index] += sum(p.grad.numel() * p.grad.element_size() for p in found if offloaded(p))
    return sizes


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for parameter, state in optimizer.state.items():
        if offloaded(parameter):
            continue
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _reset_peak_rss() -> bool:
    """Set VmHWM to the present size (proc(5): 5 in clear_refs). False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


# What an allocator held between marks: read from CUDA's own counters, or from the CPU profiler's events.

_PREFIX = "edgefed:"


@dataclasses.dataclass(frozen=True)
class Span:
    """From one mark to the next: bytes held at its start, and the most held in it."""

    name: str
    start_bytes: int
    peak_bytes: int


class CpuLog:
    """The CPU allocator's events, from the profiler."""

    before_bytes = 0
    """What the allocator held before: it does not say."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> CpuLog:
        level = os.environ.get("KINETO_LOG_LEVEL")
        os.environ["KINETO_LOG_LEVEL"] = "99"  # or it writes two lines to stderr; read when the first profiler starts
        try:
            self._profile.__enter__()
        finally:
            del os.environ["KINETO_LOG_LEVEL"]
            if level is not None:
                os.environ["KINETO_LOG_LEVEL"] = level
        return self

    def __exit__(self, *exception: object) -> None:
        self._profile.__exit__(*exception)

    def mark(self, name: str) -> None:
        with record_function(_PREFIX + name):
            pass

    def spans(self) -> list[Span]:
        events = []
        for event in self._profile.profiler.kineto_results.events():
            name = event.name()
            if name == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
                events.append((event.start_ns(), "", event.nbytes()))
            elif name.startswith(_PREFIX):
                events.append((event.start_ns(), name.removeprefix(_PREFIX), 0))
        events.sort(key=lambda event: event[0])
        spans: list[Span] = []
        held, start, peak, current = 0, 0, 0, None
        for _, name, size in events:
            if name:
                if current:
                    spans.append(Span(current, start, peak))
                current, start, peak = name, held, held
            held += size
            peak = max(peak, held)
        return spans


class CudaLog:
    """CUDA's caching allocator, read at every mark, above what it held before."""

    def __init__(self, device: torch.device):
        self._device = device
        self.before_bytes = 0
        self._marks: list[Span] = []
        self._current: tuple[str, int] | None = None

    def __enter__(self) -> CudaLog:
        # cuBLAS takes its workspace from the allocator at its first product, once for each thread: have it before.
        one = torch.ones(16, 16, device=self._device, requires_grad=True)
        (one @ one).sum().backward()
        del one
        torch.cuda.synchronize(self._device)
        self.before_bytes = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def mark(self, name: str) -> None:
        if self._current:
            peak = torch.cuda.max_memory_allocated(self._device) - self.before_bytes
            self._marks.append(Span(*self._current, peak))
        torch.cuda.reset_peak_memory_stats(self._device)
        self._current = name, torch.cuda.memory_allocated(self._device) - self.before_bytes

    def spans(self) -> list[Span]:
        return self._marks
