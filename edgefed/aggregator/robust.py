"""Defences against clients that lie: limits on how far an update may move the model, and robust means.

Clipping. Delta_{c,u} is what client c changed in unit u, and d_{c,u} its root mean square over the unit's elements, so
that units of different sizes compare. With D_{c,k} the largest d_{c,u} of a client among units of kind k (expert,
router, dense; adapters apart), the update is shortened to

    x'_{c,u} = g_u + min(1, clip * median_c D_{c,k} / d_{c,u}) (x_{c,u} - g_u)

where g_u is the current unit and the median is over the clients of the round, the lower one of two. With fewer than
`MIN_CLIENTS` clients it says nothing, and nothing is shortened. Norm clipping is that of Sun et al. (arXiv 1911.07963);
the median of the round in place of a constant is ours.

Robust means. Coordinate-wise median and trimmed mean, Yin et al. (arXiv 1803.01498). They ignore the weights of
clients, other than zero. A unit or router row with too few clients for a rule takes the weighted mean, and so does a
neuron table, of which each client has other rows.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.fold import BLOCK_ELEMENTS
from edgefed.aggregator.update_files import BlockFiles, ChangeBuffers, TensorPlace, UpdateDamaged, UpdateIndex
from edgefed.errors import ConfigError
from edgefed.kernels.fold import FoldBackend
from edgefed.protocol.frames import FLOAT_DTYPES, read_header, storage_dtype
from edgefed.protocol.messages import NEURON_TABLE, TensorInfo, UnitInfo

MIN_CLIENTS = 3
"""Smallest number of clients of which a median shows an outlier."""
ABSURD_RATIO, ABSURD_FLOOR = 10.0, 0.1
"""An update is set aside if a unit moved by more than this many times its root mean square, or times the floor."""
TRIMMED_SHARE = 0.2
"""Share of the values that the trimmed mean drops at each end, at least one value."""


# --- rules ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RobustRule:
    """``combine`` turns the values of n >= ``min_clients`` clients, (n, m) float64, into (m,). None: weighted mean."""

    name: str
    combine: Callable[[np.ndarray], np.ndarray] | None
    min_clients: int = 1


def coordinate_median(values: np.ndarray) -> np.ndarray:
    """Median of each column; of an even number, the mean of the two in the middle."""
    result: np.ndarray = np.median(values, axis=0)
    return result


def trimmed_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each column without its `TRIMMED_SHARE` smallest and largest values."""
    drop = max(1, math.floor(TRIMMED_SHARE * len(values)))
    result: np.ndarray = np.sort(values, axis=0)[drop : len(values) - drop].mean(axis=0)
    return result


RULES = {
    rule.name: rule
    for rule in (
        RobustRule("mean", None),
        RobustRule("trimmed-mean", trimmed_mean, MIN_CLIENTS),
        RobustRule("median", coordinate_median, MIN_CLIENTS),
    )
}
"""Robust rules by name; a rule added here is a value of the setting `robust`."""


def find_rule(name: str) -> RobustRule:
    """The rule of this name. Raises ConfigError."""
    if name not in RULES:
        raise ConfigError(f"unknown robust rule {name!r}, expected one of {', '.join(RULES)}")
    return RULES[name]


# --- how far clients moved the model ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moves:
    """``moved`` {(client_id, unit key): d_{c,u}}, and ``sizes`` {unit key: root mean square of the current unit}."""

    moved: Mapping[tuple[str, str], float]
    sizes: Mapping[str, float]


def measure_moves(
    units: Sequence[UnitInfo],
    updates: Mapping[str, Path],
    blobs: BlobStore,
    backend: FoldBackend,
    *,
    threads: int,
    cancelled: Callable[[], bool] = lambda: False,
    left_out: Sequence[str] = (),
) -> Moves:
    """Measure the update files {client_id: path} against the current units, one block at a time."""
    index = UpdateIndex(units, updates)
    own = threading.local()

    def measure(unit: UnitInfo) -> tuple[dict[tuple[str, str], float], float]:
        clients = [client_id for client_id in sorted(updates) if index.has(client_id, unit)]
        squares, size, count = dict.fromkeys(clients, 0.0), 0.0, 0
        if clients and not cancelled():
            if not hasattr(own, "buffers"):
                own.buffers = [np.empty(BLOCK_ELEMENTS) for _ in range(2)] + [np.empty(8 * BLOCK_ELEMENTS, np.uint8)]
                own.change = ChangeBuffers(BLOCK_ELEMENTS)
            path = blobs.path(unit.sha256)
            old = read_header(path)
            for info in unit.tensors:
                if info.dtype not in FLOAT_DTYPES:
                    continue
                count += math.prod(info.shape)
                places = {c: index.locate(c, unit.key, info.name) for c in clients}
                rows = {c: index.rows(c, unit.key, info.shape[0]) for c in clients if info.name == NEURON_TABLE}
                place = (path, old[info.name].start)
                size += _add_squares(info, place, places, rows, squares, own.buffers, own.change, backend)
        scale = math.sqrt(max(count, 1))
        return {(c, unit.key): math.sqrt(square) / scale for c, square in squares.items()}, math.sqrt(size) / scale

    trained = [unit for unit in units if unit.trainable and unit.key not in left_out]
    with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="measure") as pool:
        results = list(pool.map(measure, trained))
    moved = {key: value for found, _ in results for key, value in found.items()}
    return Moves(moved, {unit.key: size for unit, (_, size) in zip(trained, results, strict=True)})


def _add_squares(
    info: TensorInfo,
    old: tuple[Path, int],
    places: Mapping[str, TensorPlace],
    rows: Mapping[str, np.ndarray],
    squares: dict[str, float],
    buffers: list[np.ndarray],
    change: ChangeBuffers,
    backend: FoldBackend,
) -> float:
    """Add the squared distance of each client's tensor to ``squares``. Returns the sum of squares of the old one.

    ``rows`` {client_id: (W,)}: of a neuron table, the rows that the client's tensor has; empty for other tensors.
    """
    dtype, total, size = storage_dtype(info.dtype), math.prod(info.shape), 0.0
    columns = info.shape[1] if rows else 1
    step = BLOCK_ELEMENTS // columns * columns
    with BlockFiles() as files:
        for begin in range(0, total, step):
            length = min(step, total - begin)
            minus = buffers[0][:length]
            minus[:] = 0.0
            raw = files.read(old[0], old[1] + begin * dtype.itemsize, buffers[2], length, dtype)
            backend.fold_block(minus, raw, info.dtype, -1.0)
            size += float(minus @ minus)
            for client_id, place in places.items():
                delta, at = buffers[1][:length], begin
                if rows:
                    own = rows[client_id]
                    first, last = np.searchsorted(own, (begin // columns, (begin + length) // columns)).tolist()
                    delta, at = buffers[1][: (last - first) * columns], first * columns
                    if first == last:
                        continue
                if place.codec is not None:
                    count = total if not rows else len(rows[client_id]) * columns
                    delta[:] = files.read_change(place, count, at, len(delta), change)
                    squares[client_id] += float(delta @ delta)
                    continue
                if rows:
                    np.copyto(
                        delta.reshape(-1, columns), minus.reshape(-1, columns)[own[first:last] - begin // columns]
                    )
                else:
                    np.copyto(delta, minus)
                raw = files.read(place.path, place.start + at * dtype.itemsize, buffers[2], len(delta), dtype)
                if backend.fold_block(delta, raw, info.dtype, 1.0) >= 0:
                    raise UpdateDamaged(client_id, place.path)
                squares[client_id] += float(delta @ delta)
    return size


def absurd_moves(moves: Moves) -> dict[str, str]:
    """The clients that changed a unit far too much: {client_id: reason}."""
    found = {}
    for (client_id, key), moved in moves.moved.items():
        limit = ABSURD_RATIO * max(moves.sizes[key], ABSURD_FLOOR)
        if not moved <= limit and client_id not in found:
            found[client_id] = f"it changes {key!r} by {moved:.3g} per element (root mean square), limit {limit:.3g}"
    return found


def clip_factors(units: Sequence[UnitInfo], moves: Moves, clip: float) -> dict[tuple[str, str], float]:
    """{(client_id, unit key): factor below 1} of the changes that are longer than the round allows."""
    kinds = {unit.key: f"{unit.kind}{':lora' if unit.key.endswith(':lora') else ''}" for unit in units}
    largest: dict[tuple[str, str], float] = {}
    for (client_id, key), moved in moves.moved.items():
        place = (kinds[key], client_id)
        largest[place] = max(moved, largest.get(place, 0.0))
    limits = {}
    for kind in set(kinds.values()):
        of_clients = sorted(moved for (of, _), moved in largest.items() if of == kind)
        if len(of_clients) >= MIN_CLIENTS:
            limits[kind] = clip * statistics.median_low(of_clients)
    return {
        (client_id, key): limits[kinds[key]] / moved
        for (client_id, key), moved in moves.moved.items()
        if moved > limits.get(kinds[key], math.inf)
    }
