"""Slices of experts in updates: which rows of a neuron table a client sent (`edgefed.protocol.slices`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgefed.disk import disk_errors
from edgefed.errors import InvalidUpdate
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
