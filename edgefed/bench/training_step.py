"""Tokens per second of training and of profiling, by the code that a round runs.

A model that is too large for the memory or for two minutes is measured with its first layers only, at two depths; the
difference is what one layer costs, and the whole is computed from it. Such a number is marked as derived.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

from edgefed.bench.models import BenchModel, build_model, first_moe_layer, random_blocks
from edgefed.bench.statistics import Entry, Sampling
from edgefed.bench.stopwatch import Stopwatch
from edgefed.costs.memory import StepSetup, training_memory
from edgefed.costs.shapes import ModelShape
from edgefed.expert_records import ExpertPlan
from edgefed.hardware.reading import Reading
from edgefed.methods.local import Local
from edgefed.moe.model import MoeModel
from edgefed.moe.units import ExpertSource, TrainScope
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.profiling import ProfilePass, profile_blocks
from edgefed.training.steps import run_steps

WARM_UP_STEPS = 2
"""The first makes the optimizer's state; the second finds everything in place."""
LEARNING_RATE = 1e-6
"""Random weights learn nothing: small enough that the loss stays finite."""


@dataclasses.dataclass(frozen=True)
class StepWork:
    """What is measured. ``limit_s`` bounds one depth; ``memory_bytes`` the model that is built."""

    kept: int
    trainable: int
    batch_size: int
    sequence_length: int
    memory_bytes: int
    limit_s: float
    whole_below_bytes: int
    """A whole model is only built where it needs less: making random weights takes time as well."""


def depths(model: BenchModel, setup: StepSetup, work: StepWork) -> tuple[int, ...]:
    """Numbers of layers to measure: all of them, or the two smallest that have one and two MoE layers.

    Empty when not even those fit into the memory.
    """
    most = len(model.shape.layers)
    need = training_memory(model.shape, setup, work.kept, work.trainable).total_bytes
    if need <= min(work.memory_bytes, work.whole_below_bytes):
        return (most,)
    first = first_moe_layer(model.shape) + 1
    second = next(
        (i + 1 for i, layer in enumerate(model.shape.layers) if i >= first and layer.num_experts), most
    )  # fmt: skip
    found = tuple(
        depth
        for depth in dict.fromkeys((first, second))
        if training_memory(cut_shape(model.shape, depth), setup, work.kept, work.trainable).total_bytes
        <= work.memory_bytes
    )
    return found if len(found) == 2 else ()


def cut_shape(shape: ModelShape, depth: int) -> ModelShape:
    """The shape of a model with its first ``depth`` decoder layers only."""
    return dataclasses.replace(shape, layers=shape.layers[:depth])


def measure_training(
    watch: Stopwatch,
    sampling: Sampling,
    model: BenchModel,
    setup: StepSetup,
    work: StepWork,
    energy: Callable[[], Reading[float]],
) -> Iterator[Entry]:
    """Training, profiling and, where the device counts its energy, joules per token. Tokens/s over a whole step.

    Raises MemoryError when not even two layers fit, and whatever training raises.
    """
    measured = depths(model, setup, work)
    if not measured:
        raise MemoryError(f"not even {first_moe_layer(model.shape) + 2} layers of {model.name} fit beside the reserve")
    scope = TrainScope(setup.experts, setup.router, setup.attention, setup.lora_rank)
    train_s, profile_s, joules = {}, {}, None
    for depth in measured:
        moe, plan, source = build_model(model, depth, work.kept, work.trainable, scope, watch.device)
        before = energy()
        started = time.perf_counter()
        train_s[depth] = step_seconds(watch, moe, plan, setup, work, sampling)
        seconds = time.perf_counter() - started
        after = energy()
        if before.known and after.known and seconds > 0:
            joules = (after.value - before.value) / seconds * statistics.median(train_s[depth])
        profile_s[depth] = profile_seconds(watch, moe, source, scope, work, sampling)
        del moe, plan, source
        watch.release()
    tokens = work.batch_size * work.sequence_length
    most = len(model.shape.layers)
    params = {
        "model": model.name, "layers": list(measured), "layers_of": most, "kept": work.kept, "trainable": work.trainable,
        "batch_size": work.batch_size, "sequence_length": work.sequence_length, "dtype": str(model.dtype)[6:],
        "trains": setup.experts, "tokens": tokens,
    }  # fmt: skip
    whole = measured == (most,)
    note = "" if whole else f"derived from {measured[-1]} layers"
    for name, seconds_by_depth in (("train step", train_s), ("profile", profile_s)):
        rates = [tokens / seconds for seconds in extrapolate(seconds_by_depth, most)]
        yield Entry.of(
            name, "tokens/s", rates, derived=not whole,
            params={**params, "seconds_by_layers": {str(d): v for d, v in seconds_by_depth.items()}},
            note=note or ("experts from memory" if name == "profile" else ""),
        )  # fmt: skip
    if joules is None:
        reading = energy()
        yield Entry.skipped(
            "energy", "J/token", "energy is not readable", better="lower", params={"sensor": reading.describe()}
        )  # fmt: skip
    else:
        scale = (
            1.0 if whole else statistics.median(extrapolate(train_s, most)) / statistics.median(train_s[measured[-1]])
        )
        yield Entry.of("energy", "J/token", [joules * scale / tokens], better="lower", derived=not whole, params=params)


def extrapolate(seconds: dict[int, list[float]], layers: int) -> list[float]:
    """Seconds of a step of ``layers`` layers, from samples at one depth that is all of them, or at two.

    Each sample of the deeper model is continued with what it took more than the median of the shallower one, so the
    spread of the result shows how far a small error reaches when it is multiplied by the layers. A layer that seems to
    take less than nothing is noise: then its share of the deeper model stands for it.
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
    """The time is over, and there are samples."""


def step_seconds(
    watch: Stopwatch, moe: MoeModel, plan: ExpertPlan, setup: StepSetup, work: StepWork, sampling: Sampling
) -> list[float]:
    """Seconds of each training step after the warm-up: as many as asked for and as the time allows, at least one."""
    blocks = random_blocks(moe.config.get_text_config().vocab_size, work.batch_size * 4, work.sequence_length)
    training = TrainingConfig(
        local_steps=WARM_UP_STEPS + sampling.repeats, batch_size=work.batch_size, sequence_length=work.sequence_length,
        learning_rate=LEARNING_RATE, experts=setup.experts, router=setup.router, attention=setup.attention,
        lora_rank=setup.lora_rank,
    )  # fmt: skip
    deadline = time.perf_counter() + work.limit_s
    moments: list[float] = []

    def on_step(loss: float) -> None:
        watch.synchronize()
        moments.append(time.perf_counter())
        if len(moments) > WARM_UP_STEPS and moments[-1] > deadline:
            raise _Enough

    with contextlib.suppress(_Enough):
        run_steps(moe, plan, Local(), blocks, training, compute_share=1.0, seed=0, setup=setup, on_step=on_step)
    moments = moments[WARM_UP_STEPS - 1 :]
    return [end - start for start, end in zip(moments, moments[1:], strict=False)]


def profile_seconds(
    watch: Stopwatch, moe: MoeModel, source: ExpertSource, scope: TrainScope, work: StepWork, sampling: Sampling
) -> list[float]:
    """Seconds of a forward pass over one batch through all experts, one in memory at a time, as a profile runs."""
    blocks = random_blocks(moe.config.get_text_config().vocab_size, work.batch_size, work.sequence_length)
    moe.drop_experts()
    deadline = time.perf_counter() + work.limit_s / 2

    def once() -> float:
        started = time.perf_counter()
        profile_blocks(moe, blocks, source, ProfilePass(batch_size=work.batch_size), scope=scope)
        watch.synchronize()
        return time.perf_counter() - started

    once()  # everything in place
    seconds = [once()]
    while len(seconds) < sampling.repeats and time.perf_counter() < deadline:
        seconds.append(once())
    return seconds
