"""Training and profiling by the code that a round runs: tokens per second, and the memory of a real step.

A model that is too large for the memory or for two minutes is measured with its first layers only, at two depths. Their
difference is the cost of one layer, from which the whole is computed; such a result is marked as derived.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edgefed.bench.compute import Stopwatch, dtype_name
from edgefed.bench.models import BenchModel, build_model, first_moe_layer, random_blocks
from edgefed.bench.planning import PlanCase
from edgefed.bench.statistics import Entry, Sampling
from edgefed.costs.memory import StepSetup, training_memory
from edgefed.costs.shapes import ModelShape
from edgefed.expert_records import ExpertPlan
from edgefed.hardware.facts import Reading
from edgefed.methods.baselines import Local
from edgefed.moe.model import MoeModel
from edgefed.moe.units import ExpertSource, TrainScope
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.calibration import correction_from, measure_step
from edgefed.training.profiling import ProfilePass, profile_blocks
from edgefed.training.savings import make_optimizer
from edgefed.training.steps import run_steps, take_step

if TYPE_CHECKING:
    import torch

WARM_UP_STEPS = 2
"""The first step creates the optimizer's state; the second runs with everything in place."""
FEW_TOKENS = 64
"""Tokens of the small steps that are measured where those of a round are slow."""
LEARNING_RATE = 1e-6
"""Small enough that the loss of random weights stays finite."""


@dataclasses.dataclass(frozen=True)
class StepWork:
    """Size of the measured step. ``limit_s`` bounds one depth, ``memory_bytes`` the model that is built."""

    resident: int
    trainable: int
    batch_size: int
    sequence_length: int
    memory_bytes: int
    limit_s: float
    whole_below_bytes: int
    """The whole model is built only if it needs less: creating random weights takes time."""


def depths(model: BenchModel, setup: StepSetup, work: StepWork) -> tuple[int, ...]:
    """Return the numbers of layers to measure: all, or the two smallest with one and two MoE layers.

    Empty if not even those fit in memory.
    """
    most = len(model.shape.layers)
    need = training_memory(model.shape, setup, work.resident, work.trainable).total_bytes
    if need <= min(work.memory_bytes, work.whole_below_bytes):
        return (most,)
    first = first_moe_layer(model.shape) + 1
    second = next((i + 1 for i, layer in enumerate(model.shape.layers) if i >= first and layer.num_experts), most)
    found = tuple(
        depth
        for depth in dict.fromkeys((first, second))
        if training_memory(cut_shape(model.shape, depth), setup, work.resident, work.trainable).total_bytes
        <= work.memory_bytes
    )
    return found if len(found) == 2 else ()


def cut_shape(shape: ModelShape, depth: int) -> ModelShape:
    """Return the shape of a model with only its first ``depth`` decoder layers."""
    return dataclasses.replace(shape, layers=shape.layers[:depth])


def measure_training(
    watch: Stopwatch,
    sampling: Sampling,
    model: BenchModel,
    setup: StepSetup,
    work: StepWork,
    energy: Callable[[], Reading[float]],
) -> Iterator[Entry]:
    """Measure training and profiling in tokens/s, and joules per token if the device counts its energy.

    Raises MemoryError if not even two layers fit, and the errors of training.
    """
    measured = depths(model, setup, work)
    if not measured:
        raise MemoryError(f"not even {first_moe_layer(model.shape) + 2} layers of {model.name} fit above the reserve")
    scope = TrainScope(setup.experts, setup.router, setup.attention, setup.lora_rank)
    train_s: dict[int, list[float]] = {}
    profile_s: dict[int, list[float]] = {}
    joules: float | None = None
    for depth in measured:
        moe, plan, source = build_model(model, depth, work.resident, work.trainable, scope, watch.device)
        before = energy()
        started = time.perf_counter()
        train_s[depth] = step_seconds(watch, moe, plan, setup, work, sampling)
        seconds = time.perf_counter() - started
        after = energy()
        if before.value is not None and after.value is not None and seconds > 0:
            joules = (after.value - before.value) / seconds * statistics.median(train_s[depth])
        profile_s[depth] = profile_seconds(watch, moe, source, scope, work, sampling)
        del moe, plan, source
        watch.release()
    tokens = work.batch_size * work.sequence_length
    most = len(model.shape.layers)
    params = {
        "model": model.name, "layers": list(measured), "layers_of": most, "resident": work.resident,
        "trainable": work.trainable, "batch_size": work.batch_size, "sequence_length": work.sequence_length,
        "dtype": dtype_name(model.dtype), "trains": setup.experts, "tokens": tokens,
    }  # fmt: skip
    whole = measured == (most,)
    note = "" if whole else f"derived from {measured[-1]} layers"
    for name, seconds_by_depth in (("train step", train_s), ("profile", profile_s)):
        rates = [tokens / seconds for seconds in extrapolate(seconds_by_depth, most)]
        yield Entry.of(
            name, "tokens/s", rates, derived=not whole,
            params={**params, "seconds_by_layers": {str(d): v for d, v in seconds_by_depth.items()}},
            note=note or ("experts read from memory" if name == "profile" else ""),
        )  # fmt: skip
    if joules is None:
        reason, sensor = "the energy counter is unreadable", {"sensor": energy().describe()}
        yield Entry.skipped("energy", "J/token", reason, better="lower", params=sensor)
    else:
        scale = (
            1.0 if whole else statistics.median(extrapolate(train_s, most)) / statistics.median(train_s[measured[-1]])
        )
        yield Entry.of("energy", "J/token", [joules * scale / tokens], better="lower", derived=not whole, params=params)


def extrapolate(seconds: dict[int, list[float]], layers: int) -> list[float]:
    """Compute the seconds of a step of ``layers`` layers from samples at that depth, or at two smaller ones.

    Each sample of the deeper model is extended by its difference from the median of the shallower one, so the spread of
    the result shows the effect of a small error multiplied by the layers. A negative difference is noise: one layer is
    then estimated as its share of the deeper model.
    """
    deepest = max(seconds)
    if deepest == layers:
        return seconds[deepest]
    shallow = min(seconds)
    base = statistics.median(seconds[shallow])
    result = []
    for sample in seconds[deepest]:
        layer = (sample - base) / (deepest - shallow)
        if layer <= 0:
            layer = sample / deepest
        result.append(sample + (layers - deepest) * layer)
    return result


class _Enough(Exception):
    """The time limit is reached, and there are samples."""


def step_seconds(
    watch: Stopwatch,
    moe: MoeModel,
    plan: ExpertPlan,
    setup: StepSetup,
    work: StepWork,
    sampling: Sampling,
    warm_up: int = WARM_UP_STEPS,
    on_step: Callable[[], None] = lambda: None,
    measure: Callable[[torch.optim.Optimizer, Callable[[], None]], None] | None = None,
) -> list[float]:
    """Return the seconds of each training step after ``warm_up`` steps, at least one, within the time limit.

    ``measure`` as in `run_steps`.
    """
    blocks = random_blocks(moe.config.get_text_config().vocab_size, work.batch_size * 4, work.sequence_length)
    training = TrainingConfig(
        local_steps=warm_up + sampling.repeats, batch_size=work.batch_size, sequence_length=work.sequence_length,
        learning_rate=LEARNING_RATE, experts=setup.experts, router=setup.router, attention=setup.attention,
        lora_rank=setup.lora_rank,
    )  # fmt: skip
    deadline = time.perf_counter() + work.limit_s
    moments: list[float] = []

    def note(loss: float) -> None:
        watch.synchronize()
        moments.append(time.perf_counter())
        on_step()
        if len(moments) > warm_up and moments[-1] > deadline:
            raise _Enough

    with contextlib.suppress(_Enough):
        run_steps(
            moe, plan, Local(), blocks, training, compute_share=1.0, seed=0, setup=setup, on_step=note, measure=measure
        )
    moments = moments[warm_up - 1 :]
    return [end - start for start, end in zip(moments, moments[1:], strict=False)]


def seconds_of_step(
    watch: Stopwatch, sampling: Sampling, model: BenchModel, setup: StepSetup, work: StepWork, neuron_share: float = 1.0
) -> float:
    """Return the median seconds of a training step of the whole model under ``setup``, with random weights.

    With ``neuron_share`` below 1, each expert has this share of its neurons. Where a step is slow, small ones are
    measured instead (`SmallSteps`). Raises MemoryError if not even two layers fit, and the errors of training.
    """
    shape = model.shape.sliced([neuron_share] * len(model.shape.moe_layers)) if neuron_share < 1.0 else model.shape
    sized = dataclasses.replace(model, shape=shape)
    scope = TrainScope(setup.experts, setup.router, setup.attention, setup.lora_rank)
    measured = depths(sized, setup, work)
    if not measured:
        raise MemoryError(f"not even two layers of {model.name} fit")

    def build(depth: int, work: StepWork) -> tuple[MoeModel, ExpertPlan, ExpertSource]:
        return build_model(
            sized, depth, work.resident, work.trainable, scope, watch.device,
            storage=setup.expert_storage, neuron_share=neuron_share,
        )  # fmt: skip

    if len(measured) == 2:
        small, limit_s = SmallSteps.of(work, shape.top_k), work.limit_s
        shallow = small.measure(watch, setup, *build(measured[0], small.work)[:2])
        if (shallow.gradients_s + shallow.optimizer_s) * small.times * (WARM_UP_STEPS + 1) > limit_s:
            deep = small.measure(watch, setup, *build(measured[1], small.work)[:2])
            return small.extrapolate(shallow, deep, measured, len(shape.layers))
    seconds: dict[int, list[float]] = {}
    for depth in measured:
        moe, plan, source = build(depth, work)
        seconds[depth] = step_seconds(watch, moe, plan, setup, work, sampling)
        del moe, plan, source
        watch.release()
    return statistics.median(extrapolate(seconds, len(shape.layers)))


class StepParts(NamedTuple):
    """Seconds of a step: forward and backward pass, and the optimizer."""

    gradients_s: float
    optimizer_s: float


@dataclasses.dataclass(frozen=True)
class SmallSteps:
    """Steps of few tokens and few experts, from which that of ``whole`` is computed.

        seconds = (head + layers * slope) * tokens + layers * update * trainable experts

    An expert has about as many tokens as in the whole step, as long as a token has its experts. What the forward pass
    costs whatever the tokens, such as to unpack weights, is counted as if it grew with them.
    """

    whole: StepWork
    work: StepWork

    @classmethod
    def of(cls, whole: StepWork, top_k: int) -> SmallSteps:
        """The small steps for ``whole``. Where only some experts train, one does."""
        resident = min(whole.resident, top_k)
        trainable = resident if whole.trainable == whole.resident else min(whole.trainable, 1)
        length = min(FEW_TOKENS, whole.sequence_length)
        work = dataclasses.replace(
            whole, resident=resident, trainable=trainable, batch_size=1, sequence_length=length
        )  # fmt: skip
        return cls(whole, work)

    @property
    def times(self) -> float:
        """How many times as many tokens the whole step has."""
        return self.whole.batch_size * self.whole.sequence_length / self.work.sequence_length

    def measure(self, watch: Stopwatch, setup: StepSetup, moe: MoeModel, plan: ExpertPlan) -> StepParts:
        """Take two small steps; the second is measured."""
        small = dataclasses.replace(setup, batch_size=1, sequence_length=self.work.sequence_length)
        moments: list[float] = []

        def note(*_: object) -> None:
            watch.synchronize()
            moments.append(time.perf_counter())

        def first(optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
            optimizer.register_step_pre_hook(note)
            step()

        step_seconds(watch, moe, plan, small, self.work, Sampling(1), 1, on_step=note, measure=first)
        _, end_of_first, update, end = moments
        watch.release()
        return StepParts(update - end_of_first, end - update)

    def extrapolate(self, shallow: StepParts, deep: StepParts, depths: Sequence[int], layers: int) -> float:
        """Return the seconds of the whole step of ``layers`` layers, from small ones at two ``depths``."""
        gradients, updates = (
            statistics.median(extrapolate({depths[0]: [a], depths[1]: [b]}, layers))
            for a, b in zip(shallow, deep, strict=True)
        )
        return gradients * self.times + updates * self.whole.trainable / max(1, self.work.trainable)


def profile_seconds(
    watch: Stopwatch, moe: MoeModel, source: ExpertSource, scope: TrainScope, work: StepWork, sampling: Sampling
) -> list[float]:
    """Return the seconds of a profile over one batch: a forward pass with one expert at a time in memory."""
    blocks = random_blocks(moe.config.get_text_config().vocab_size, work.batch_size, work.sequence_length)
    moe.drop_experts()
    deadline = time.perf_counter() + work.limit_s / 2

    def once() -> float:
        started = time.perf_counter()
        profile_blocks(moe, blocks, source, ProfilePass(batch_size=work.batch_size), scope=scope)
        watch.synchronize()
        return time.perf_counter() - started

    once()  # warm up
    seconds = [once()]
    while len(seconds) < sampling.repeats and time.perf_counter() < deadline:
        seconds.append(once())
    return seconds


def measure_memory(watch: Stopwatch, model: BenchModel, case: PlanCase, work: StepWork) -> dict[str, Any]:
    """Measure the memory of a real step: {layers, predicted_bytes, measured_bytes, corrected_bytes, phases}.

    A model that is too large is measured with its first layers, and compared with the prediction for these layers. The
    second step is measured, because the first has no optimizer state yet. ``corrected_bytes`` is the prediction after
    the correction by this step. Raises MemoryError if not even two layers fit.
    """
    work = dataclasses.replace(work, resident=case.resident, trainable=case.trainable)
    found = depths(model, case.setup, work)
    if not found:
        raise MemoryError(f"two layers of {model.name} do not fit")
    depth = found[-1]
    shape = cut_shape(model.shape, depth)
    setup = case.setup
    scope = TrainScope(setup.experts, setup.router, setup.attention, setup.lora_rank)
    moe, plan, source = build_model(model, depth, case.resident, case.trainable, scope, watch.device)
    del source
    setup = dataclasses.replace(setup, kernels=moe.training_kernels())  # known now; the case assumes them
    parameters = list(moe.trainable_parameters())
    optimizer = make_optimizer(parameters, setup.optimizer, learning_rate=LEARNING_RATE, weight_decay=0.0)
    blocks = random_blocks(moe.config.get_text_config().vocab_size, setup.batch_size, setup.sequence_length)
    moe.module.train()

    def step() -> None:
        take_step(moe, optimizer, parameters, blocks.input_ids, blocks.labels, setup=setup, max_grad_norm=1.0)

    step()
    optimizer.zero_grad(set_to_none=True)
    measured = measure_step(moe, optimizer, step)
    predicted = training_memory(shape, setup, case.resident, case.trainable)
    correction = correction_from(measured, shape, setup)
    corrected = training_memory(shape, setup, case.resident, case.trainable, correction)
    return {
        "layers": depth,
        "layers_of": len(model.shape.layers),
        "predicted_bytes": predicted.total_bytes,
        "measured_bytes": measured.peak_bytes,
        "corrected_bytes": corrected.total_bytes,
        "process_bytes": measured.process_bytes,
        "phases": dict(measured.phases),
    }
