"""Experts outside the memory that computes: how much room they take there, and what reading them costs in time.

    seconds of a step = max(computation, reads) + the first layer's share of the reads

Streamed layers are read while others compute (`edgefed.moe.expert_stream`): once in the forward pass and once more in
the backward pass. On a GPU, each pass begins with the two layers that the last one ended with, which are still there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from edgefed.costs.activations import expert_bytes, rounded_up, streamed_layer_bytes, trained_tensors
from edgefed.costs.roofline import training_step
from edgefed.costs.shapes import ModelShape
from edgefed.costs.step_setup import StepSetup


@dataclasses.dataclass(frozen=True)
class StreamRates:
    """What a device computes and reads: operations per second, and bytes per second of its memory and of the stream."""

    flops_per_s: float
    memory_bytes_per_s: float
    stream_bytes_per_s: float


def offloaded_bytes(shape: ModelShape, setup: StepSetup, resident: Sequence[int], trainable: Sequence[int]) -> int:
    """Bytes of offloaded experts in host memory or files: weights, and gradients and two moments of trainable ones."""
    total = 0.0
    for layer, count_resident, count_trainable in zip(shape.moe_layers, resident, trainable, strict=True):
        expert, _ = trained_tensors(layer, setup)
        total += count_resident * expert_bytes(layer, setup) + 3 * count_trainable * sum(n * w for n, w in expert)
    return rounded_up(total)


def streamed_bytes(shape: ModelShape, setup: StepSetup, resident: Sequence[int], trainable: Sequence[int]) -> int:
    """Bytes of streamed experts in host memory or files."""
    counts = enumerate(zip(shape.moe_layers, resident, trainable, strict=True))
    streamed = (each for ordinal, each in counts if setup.streams(ordinal, len(resident)))
    return rounded_up(sum(streamed_layer_bytes(layer, setup, r, t) for layer, r, t in streamed))


def read_seconds(
    shape: ModelShape, setup: StepSetup, resident: Sequence[int], trainable: Sequence[int], bytes_per_s: float
) -> float:
    """Seconds that one step reads streamed experts."""
    count = max(1, setup.streamed_layers)
    read = 1.0 if setup.device == "cpu" else max(0, count - 2) / count  # of the layers, in each of two passes
    return 2.0 * read * streamed_bytes(shape, setup, resident, trainable) / bytes_per_s


def slowdown(
    shape: ModelShape, setup: StepSetup, resident: Sequence[int], trainable: Sequence[int], rates: StreamRates
) -> float:
    """Time of a step with streamed experts, as a multiple of the same step with all of them in memory."""
    pairs = [t / max(1, r) for r, t in zip(resident, trainable, strict=True)]
    step = training_step(shape, setup, resident, trainable, pairs)
    operations = (*step.forward, *step.backward, *step.optimizer)
    computed = sum(each.seconds(rates.flops_per_s, rates.memory_bytes_per_s) for each in operations)
    reads = read_seconds(shape, setup, resident, trainable, rates.stream_bytes_per_s)
    return (max(computed, reads) + reads / (2 * max(1, setup.streamed_layers))) / computed
