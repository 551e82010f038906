"""Rows in updates: those of a neuron table that a client sent (`edgefed.protocol.slices`), and weights by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgefed.disk import disk_errors
from edgefed.errors import InvalidUpdate
from edgefed.protocol.alternation import LORA_A
from edgefed.protocol.frames import ENCODED_DTYPE, TensorEntry, storage_dtype
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, TensorInfo, UnitInfo
from edgefed.protocol.slices import INDEX_DTYPE, are_rows, neuron_table, slice_tensors


def upload_tensors(unit: UnitInfo) -> tuple[TensorInfo, ...]:
    """The tensors of a unit in an update, with the largest possible index of a sliced one."""
    table = neuron_table(unit)
    if table is None:
        return unit.tensors
    return slice_tensors(unit.tensors, table.shape[0])


def check_slice(path: Path, unit: UnitInfo, tensors: Mapping[str, TensorEntry]) -> None:
    """Check that an uploaded unit's table has as many rows as its index names, all of them rows of the unit.

    ``tensors`` are those of the unit in the frame at ``path``, by name. Raises InvalidUpdate.
    """
    table, index, whole = tensors[NEURON_TABLE].info, tensors[NEURON_INDEX], neuron_table(unit)
    assert whole is not None, "the unit has a table"
    fits = table.dtype == ENCODED_DTYPE or table.shape == (*index.info.shape, *whole.shape[1:])
    if len(index.info.shape) != 1 or not fits:  # the length of an encoded table was checked against the index
        raise InvalidUpdate(
            f"{unit.key!r}: the neuron table has shape {list(table.shape)} and its index "
            f"{list(index.info.shape)}, expected [W, {whole.shape[1]}] and [W]"
        )
    rows = read_rows(path, index.start, index.info.shape[0])
    if not are_rows(rows, whole.shape[0]):
        raise InvalidUpdate(
            f"{unit.key!r}: the index must name neurons 0..{whole.shape[0] - 1} in ascending order, found "
            f"{rows[:8].tolist()}"
        )


def read_rows(path: Path, start: int, count: int) -> np.ndarray:
    """Read an index of ``count`` rows at byte ``start`` of an update, (W,)."""
    dtype = storage_dtype(INDEX_DTYPE)
    with disk_errors(f"read {path}"), path.open("rb") as file:
        file.seek(start)
        return np.frombuffer(file.read(count * dtype.itemsize), dtype=dtype)


def row_weights(weight: float, rows: np.ndarray, num_rows: int) -> np.ndarray:
    """The weight of a client for every row of the global table, (I,): 0 for rows that it did not send."""
    weights = np.zeros(num_rows)
    weights[rows] = weight
    return weights


def row_runs(rows: Sequence[int] | np.ndarray, shares: np.ndarray) -> Iterator[tuple[int, int]]:
    """Positions begin .. end in ``rows`` of neighbouring rows with one share, (I,) of the table: one sum each."""
    rows = np.asarray(rows, dtype=np.int64)
    own = shares[rows]
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(own) != 0)) + 1
    bounds = [0, *breaks.tolist(), len(rows)]
    yield from zip(bounds, bounds[1:], strict=False)


def shares_of(
    weights: Sequence[float | np.ndarray], info: TensorInfo
) -> tuple[list[float | np.ndarray], np.ndarray | None]:
    """Weights divided by their sum, per tensor or per row; and the rows that keep their old value, (E,) bool.

    A tensor without a row per expert takes the mean of a client's row weights; so does the first factor of an adapter,
    whose rows are its rank. Raises ValueError for a weight that is
    negative or not finite.
    """
    arrays = [np.asarray(weight, dtype=np.float64) for weight in weights]
    for array in arrays:
        if array.ndim > 1 or not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(
                f"a weight for tensor {info.name!r} is {array}: expected finite numbers from 0, scalar or (E,)"
            )
    rows = {array.shape for array in arrays if array.ndim}
    if len(rows) > 1 or (rows and any(array.ndim == 0 for array in arrays)):
        raise ValueError(f"the weights for tensor {info.name!r} are of different kinds: {[a.shape for a in arrays]}")
    if not rows or not info.shape or (info.shape[0],) not in rows or info.name.endswith(LORA_A):
        means = [float(array.mean()) for array in arrays]
        total = float(sum(means))
        return [mean / total if total > 0 else 0.0 for mean in means], None
    total = np.sum(arrays, axis=0)
    return [np.divide(array, total, out=np.zeros_like(array), where=total > 0) for array in arrays], total == 0


def row_parts(begin: int, length: int, row_elements: int) -> Iterator[tuple[slice, int]]:
    """The rows in elements [begin, begin + length) as (slice of the block, row)."""
    at = begin
    while at < begin + length:
        row = at // row_elements
        end = min((row + 1) * row_elements, begin + length)
        yield slice(at - begin, end - begin), row
        at = end


def sent_values(info: TensorInfo, rows: np.ndarray | None) -> int:
    """Values of a client's tensor: all of ``info``, or the ``rows`` of a table."""
    return math.prod(info.shape if rows is None else (len(rows), *info.shape[1:]))
