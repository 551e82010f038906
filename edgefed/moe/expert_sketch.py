"""Short descriptions of experts, so that those of a model can be compared although it never fits into memory.

An expert with D numbers is cut into chunks of m, each number gets a random sign, and the chunks are added up:

    s = sum_j sign_j * chunk_j,    E <s(a), s(b)> = <a, b>

(a count sketch). The relative error of a squared distance is about sqrt(2 / m). Experts are read one at a time: the
memory is one expert, its signs and E sketches, the time O(D) per expert. m is prime, so that the numbers of one row or
column of a matrix, whose width is usually a power of two, do not all meet in a few places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.clustering import principal_components
from edgefed.moe.expert_reading import check_expert
from edgefed.moe.sources import ExpertSource

SKETCH_SIZE = 4093
"""m: a prime below 4096. Squared distances are off by about 2 %."""
COMPONENTS = 32
"""Ours: principal components that are kept. Flux does not say how many."""


def sketch_layer(layer: ExpertLayer, source: ExpertSource, *, seed: int = 0, size: int = SKETCH_SIZE) -> np.ndarray:
    """The sketches of all experts of a layer, (E, size) float32. Base weights only, without adapters: adapters are
    small beside them, and the base of a LoRA run never changes, so it is sketched once.

    The signs depend on ``seed``, the tensor's place in the expert and its shape alone. Raises CheckpointError.
    """
    signs = {}
    for place, parameter in enumerate(layer.parameters):
        numel = torch.Size(parameter.shape).numel()
        generator = torch.Generator().manual_seed(seed * len(layer.parameters) + place)
        bits = torch.randint(0, 2, (numel,), generator=generator, dtype=torch.int8)
        signs[parameter.name] = bits.mul_(2).sub_(1)
    rows = []
    for expert in range(layer.num_experts):
        key = layer.expert_key(expert)
        tensors = source.read(key)
        check_expert(layer, key, tensors)
        row = torch.zeros(size)
        for name, sign in signs.items():
            _add_chunks(row, tensors[name].detach().reshape(-1), sign)
        rows.append(row.numpy())
    return np.stack(rows)


def _add_chunks(row: torch.Tensor, values: torch.Tensor, signs: torch.Tensor) -> None:
    """Add the signed chunks of ``values`` (D,) to ``row`` (m,), about a million numbers at a time."""
    size = len(row)
    step = max(1, (1 << 20) // size) * size
    for begin in range(0, len(values), step):
        part = values[begin : begin + step].to("cpu", torch.float32) * signs[begin : begin + step]
        whole = len(part) // size * size
        row += part[:whole].view(-1, size).sum(dim=0)
        row[: len(part) - whole] += part[whole:]


def expert_points(
    layers: Sequence[ExpertLayer],
    source: ExpertSource,
    *,
    components: int = COMPONENTS,
    seed: int = 0,
    on_layer: Callable[[int], None] = lambda ordinal: None,
) -> tuple[np.ndarray, ...]:
    """Principal components of the experts of every layer, (E_l, d_l) float64: what `plan_merging` clusters.

    One layer's sketches are in memory at a time. They describe all experts, not only those to be merged, so they stand
    from round to round as long as the weights do. Raises CheckpointError.
    """
    points = []
    for layer in layers:
        points.append(principal_components(sketch_layer(layer, source, seed=seed), components))
        on_layer(layer.ordinal)
    return tuple(points)
