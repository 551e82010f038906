"""Slices of experts in updates: which rows of a neuron table a client sent.

In a run whose devices hold slices, an expert unit has a table with a row per neuron (`protocol.messages.NEURON_TABLE`).
An update has only some of its rows, and beside them a `NEURON_INDEX` that names them: int32 (W,), ascending.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgefed.disk import disk_errors
from edgefed.errors import InvalidUpdate
from edgefed.protocol.frames import TensorEntry, storage_dtype
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, TensorInfo, UnitInfo

INDEX_DTYPE = "I32"


def neuron_table(unit: UnitInfo) -> TensorInfo | None:
    """The neuron table of a unit, (I, C); None if the unit has none."""
    return next((info for info in unit.tensors if info.name == NEURON_TABLE), None)


def upload_tensors(unit: UnitInfo) -> tuple[TensorInfo, ...]:
    """The tensors of a unit in an update, with the largest possible index of a sliced one."""
    table = neuron_table(unit)
    if table is None:
        return unit.tensors
    return (*unit.tensors, TensorInfo(name=NEURON_INDEX, dtype=INDEX_DTYPE, shape=(table.shape[0],)))


def check_slice(path: Path, unit: UnitInfo, tensors: Mapping[str, TensorEntry]) -> None:
    """Check that an uploaded unit's table has as many rows as its index names, all of them rows of the unit.

    ``tensors`` are those of the unit in the frame at ``path``, by name. Raises InvalidUpdate.
    """
    table, index, whole = tensors[NEURON_TABLE].info, tensors[NEURON_INDEX], neuron_table(unit)
    assert whole is not None, "the unit has a table"
    if len(index.info.shape) != 1 or table.shape != (*index.info.shape, *whole.shape[1:]):
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


def are_rows(rows: np.ndarray, num_rows: int) -> bool:
    """Whether ``rows`` are one or more rows of a table of ``num_rows``, ascending, none twice."""
    return bool(len(rows) and rows[0] >= 0 and rows[-1] < num_rows and (np.diff(rows.astype(np.int64)) > 0).all())


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
