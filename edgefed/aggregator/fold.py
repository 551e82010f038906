"""Aggregation at the end of a round: weighted means of units, block by block from the update files into new blobs.

    next = sum_c w_c x_c / sum_c w_c          per tensor, or per leading row where w_c is an array (E,)

The table of an expert's neurons is averaged row by row over the clients that sent the row, and a row that nobody sent
keeps its value (`edgefed.aggregator.slices`).

Clients are taken in the order of their ids and sums are float64 (`edgefed.kernels.fold`), so the result is bitwise
independent of the order of arrival and of restarts. Memory is a few blocks per thread for any model and number of
clients: files are read into one reused buffer and not mapped, because mapped pages count as resident memory. The
method's weights are given as `methods.interface.UnitMerge`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.slices import are_rows, neuron_table, read_rows, row_runs, row_weights, upload_tensors
from edgefed.aggregator.validate import read_exactly
from edgefed.disk import disk_errors
from edgefed.errors import StateCorrupt
from edgefed.kernels.fold import FoldBackend
from edgefed.methods.interface import UnitMerge
from edgefed.protocol.frames import FLOAT_DTYPES, TensorEntry, encode_header, read_header, storage_dtype, update_name
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, TensorInfo, UnitInfo

BLOCK_ELEMENTS = 64 * 1024
"""Elements per block: 512 KiB of float64 sums stay in the second-level cache while all clients are added."""
MAX_OPEN_FILES = 64
"""Open files per thread: a round may have more clients than a process can open files."""
_ABSENT = -1


class FoldCancelled(Exception):
    """The server stops during aggregation, which the next start repeats. Never leaves the server."""


@dataclasses.dataclass(frozen=True)
class _Source:
    """Position of one client's tensor, and the client's share: a float, or (E,) for rows.

    ``rows``: of a slice, the ascending rows of the global table that the client's tensor has.
    """

    client_id: str
    path: Path
    start: int
    share: float | np.ndarray
    rows: np.ndarray | None = None


class UpdateIndex:
    """Position of each tensor in each update file, in 8 bytes per tensor and client; headers take many more."""

    def __init__(self, units: Sequence[UnitInfo], updates: Mapping[str, Path]):
        """Read the header of each file in ``updates`` {client_id: path}."""
        names = [update_name(unit.key, info.name) for unit in units if unit.trainable for info in upload_tensors(unit)]
        self._order = {name: at for at, name in enumerate(names)}
        self._paths = dict(updates)
        self._starts = {}
        self._widths: dict[str, np.ndarray] = {}
        sliced = any(neuron_table(unit) for unit in units)
        for client_id, path in updates.items():
            starts = np.full(len(names), _ABSENT, dtype=np.int64)
            widths = np.zeros(len(names) if sliced else 0, dtype=np.int32)
            for name, entry in read_header(path).items():
                starts[self._order[name]] = entry.start
                if sliced and entry.info.shape:
                    widths[self._order[name]] = entry.info.shape[0]
            self._starts[client_id], self._widths[client_id] = starts, widths

    def locate(self, client_id: str, unit_key: str, name: str) -> tuple[Path, int]:
        """File and first byte of a tensor. Raises ValueError if the client did not upload it: the plan is wrong."""
        at = self._order.get(update_name(unit_key, name))
        start = int(self._starts[client_id][at]) if at is not None and client_id in self._starts else _ABSENT
        if start == _ABSENT:
            raise ValueError(f"the merge plan needs unit {unit_key!r} of client {client_id!r}, which did not upload it")
        return self._paths[client_id], start

    def rows(self, client_id: str, unit_key: str, num_rows: int) -> np.ndarray:
        """Rows of a table of ``num_rows`` neurons that a client uploaded, (W,). Raises ValueError, StateCorrupt."""
        path, start = self.locate(client_id, unit_key, NEURON_INDEX)
        width = int(self._widths[client_id][self._order[update_name(unit_key, NEURON_INDEX)]])
        rows = read_rows(path, start, width)
        if len(rows) != width or not are_rows(rows, num_rows):
            raise StateCorrupt(f"update {path} of client {client_id!r} changed after it was accepted")
        return rows


def fold_round(
    units: Sequence[UnitInfo],
    plan: Mapping[str, UnitMerge],
    updates: Mapping[str, Path],
    blobs: BlobStore,
    backend: FoldBackend,
    *,
    threads: int | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[UnitInfo]:
    """Write the units of the next global model that differ from the current one. Returns them, in manifest order.

    Their blobs are durable when this returns. ``updates`` maps clients to validated update files; ``threads`` None
    means one per processor, at most four. Raises ValueError if the updates or units do not cover the plan, StateCorrupt
    if a file has changed since its validation, DiskFull, StorageError, FoldCancelled.
    """
    unknown = plan.keys() - {unit.key for unit in units if unit.trainable}
    if unknown:
        raise ValueError(f"the merge plan names units that are not trainable in this run: {sorted(unknown)[:4]}")
    index = UpdateIndex(units, updates)
    planned = [unit for unit in units if unit.key in plan]
    scratches = threading.local()

    def fold_one(unit: UnitInfo) -> UnitInfo:
        if not hasattr(scratches, "own"):
            scratches.own = _Scratch(backend, cancelled)
        chunks = _unit_chunks(unit, plan[unit.key], index, blobs.path(unit.sha256), scratches.own)
        sha256, size_bytes = batch.put(chunks)
        return unit if sha256 == unit.sha256 else msgspec.structs.replace(unit, sha256=sha256, size_bytes=size_bytes)

    threads = threads or min(4, os.cpu_count() or 1)
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="fold")
    with blobs.batch() as batch:
        try:
            folded = list(pool.map(fold_one, planned))
        finally:  # after an error no further unit starts; the batch is discarded once no thread uses it
            pool.shutdown(wait=True, cancel_futures=True)
    return [new for new, old in zip(folded, planned, strict=True) if new is not old]


class _Scratch:
    """The buffers of one thread."""

    def __init__(self, backend: FoldBackend, cancelled: Callable[[], bool]):
        self.backend = backend
        self.cancelled = cancelled
        self.sums = np.empty(BLOCK_ELEMENTS, dtype=np.float64)
        self.raw = np.empty(BLOCK_ELEMENTS * 8, dtype=np.uint8)
        self.out = np.empty(BLOCK_ELEMENTS * 8, dtype=np.uint8)


def _unit_chunks(
    unit: UnitInfo, merge: UnitMerge, index: UpdateIndex, old_path: Path, scratch: _Scratch
) -> Iterator[bytes | memoryview]:
    """The bytes of the unit's next blob. A chunk is valid until the next one is requested."""
    weights = sorted(merge.weights, key=lambda pair: pair[0])
    old = read_header(old_path)
    yield encode_header(unit.tensors)
    for info in unit.tensors:
        if info.dtype not in FLOAT_DTYPES:
            raise ValueError(f"tensor {info.name!r} of unit {unit.key!r} is {info.dtype}: only floats are averaged")
        rows: list[np.ndarray | None] = [None] * len(weights)
        given = [weight for _, weight in weights]
        if info.name == NEURON_TABLE:
            found = [index.rows(client_id, unit.key, info.shape[0]) for client_id, _ in weights]
            given = [row_weights(float(weight), own, info.shape[0]) for weight, own in zip(given, found, strict=True)]
            rows = [*found]
        shares, keep_rows = _shares(given, info)
        sources = [
            _Source(client_id, *index.locate(client_id, unit.key, info.name), share, own)
            for (client_id, _), share, own in zip(weights, shares, rows, strict=True)
            if np.any(share)
        ]
        if sources and keep_rows is not None and info.name == NEURON_TABLE:
            yield from _table_chunks(info, sources, keep_rows, old_path, old[info.name], scratch)
        elif sources:
            yield from _tensor_chunks(info, sources, keep_rows, old_path, old[info.name], scratch)
        else:
            yield from _copy_chunks(old_path, old[info.name], scratch)


def _shares(
    weights: Sequence[float | np.ndarray], info: TensorInfo
) -> tuple[list[float | np.ndarray], np.ndarray | None]:
    """Weights divided by their sum, per tensor or per row; and the rows that keep their old value, (E,) bool.

    A tensor without a row per expert takes the mean of a client's row weights. Raises ValueError for a weight that is
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
    if not rows or not info.shape or (info.shape[0],) not in rows:
        means = [float(array.mean()) for array in arrays]
        total = float(sum(means))
        return [mean / total if total > 0 else 0.0 for mean in means], None
    total = np.sum(arrays, axis=0)
    return [np.divide(array, total, out=np.zeros_like(array), where=total > 0) for array in arrays], total == 0


def _tensor_chunks(
    info: TensorInfo,
    sources: Sequence[_Source],
    keep_rows: np.ndarray | None,
    old_path: Path,
    old: TensorEntry,
    scratch: _Scratch,
) -> Iterator[memoryview]:
    dtype = storage_dtype(info.dtype)
    count = old.size_bytes // dtype.itemsize
    row_elements = count // info.shape[0] if keep_rows is not None else count
    with _Files() as files:
        for begin in range(0, count, BLOCK_ELEMENTS):
            if scratch.cancelled():
                raise FoldCancelled("the server stops; the next start aggregates the round again")
            length = min(BLOCK_ELEMENTS, count - begin)
            sums, out = scratch.sums[:length], scratch.out[: length * dtype.itemsize].view(dtype)
            sums[:] = -0.0  # neutral element of addition: 0.0 would turn a mean of -0.0 into 0.0
            for source in sources:
                raw = files.read(source.path, source.start + begin * dtype.itemsize, scratch.raw, length, dtype)
                for part, row in _rows(begin, length, row_elements):
                    share = source.share if isinstance(source.share, float) else float(source.share[row])
                    if share and scratch.backend.fold_block(sums[part], raw[part], info.dtype, share) >= 0:
                        raise StateCorrupt(
                            f"update {source.path} of client {source.client_id!r} changed after it was accepted"
                        )
            scratch.backend.narrow_block(sums, info.dtype, out)
            if keep_rows is not None and keep_rows.any():
                raw = files.read(old_path, old.start + begin * dtype.itemsize, scratch.raw, length, dtype)
                for part, row in _rows(begin, length, row_elements):
                    if keep_rows[row]:
                        out[part] = raw[part]
            yield memoryview(out.data).cast("B")


def _table_chunks(
    info: TensorInfo,
    sources: Sequence[_Source],
    keep_rows: np.ndarray,
    old_path: Path,
    old: TensorEntry,
    scratch: _Scratch,
) -> Iterator[memoryview]:
    """As `_tensor_chunks`, for a neuron table of which each source has some rows."""
    dtype = storage_dtype(info.dtype)
    num_rows, columns = info.shape
    if not 0 < columns <= BLOCK_ELEMENTS:
        raise ValueError(f"a neuron has {columns} numbers: expected 1..{BLOCK_ELEMENTS}")
    step = BLOCK_ELEMENTS // columns
    with _Files() as files:
        for begin in range(0, num_rows, step):
            if scratch.cancelled():
                raise FoldCancelled("the server stops; the next start aggregates the round again")
            end = min(begin + step, num_rows)
            length = (end - begin) * columns
            sums, out = scratch.sums[:length], scratch.out[: length * dtype.itemsize].view(dtype)
            sums[:] = -0.0
            for source in sources:
                assert source.rows is not None, "a source of a table has rows"
                assert isinstance(source.share, np.ndarray), "and a share for each row"
                first, last = np.searchsorted(source.rows, (begin, end)).tolist()
                if first == last:
                    continue
                start = source.start + first * columns * dtype.itemsize
                raw = files.read(source.path, start, scratch.raw, (last - first) * columns, dtype)
                rows = source.rows[first:last]
                for at, stop in row_runs(rows, source.share):
                    part = sums[(rows[at] - begin) * columns : (rows[stop - 1] + 1 - begin) * columns]
                    share = float(source.share[rows[at]])
                    block = raw[at * columns : stop * columns]
                    if share and scratch.backend.fold_block(part, block, info.dtype, share) >= 0:
                        raise StateCorrupt(
                            f"update {source.path} of client {source.client_id!r} changed after it was accepted"
                        )
            scratch.backend.narrow_block(sums, info.dtype, out)
            if keep_rows[begin:end].any():
                size = columns * dtype.itemsize
                kept = files.read(old_path, old.start + begin * size, scratch.raw, length, dtype)
                mask = keep_rows[begin:end]
                out.reshape(-1, columns)[mask] = kept.reshape(-1, columns)[mask]
            yield memoryview(out.data).cast("B")


def _rows(begin: int, length: int, row_elements: int) -> Iterator[tuple[slice, int]]:
    """The rows in elements [begin, begin + length) as (slice of the block, row)."""
    at = begin
    while at < begin + length:
        row = at // row_elements
        end = min((row + 1) * row_elements, begin + length)
        yield slice(at - begin, end - begin), row
        at = end


def _copy_chunks(path: Path, entry: TensorEntry, scratch: _Scratch) -> Iterator[memoryview]:
    with _Files() as files:
        for begin in range(0, entry.size_bytes, scratch.out.nbytes):
            length = min(scratch.out.nbytes, entry.size_bytes - begin)
            yield files.read(path, entry.start + begin, scratch.out, length, np.dtype(np.uint8)).data


class _Files:
    """Open files of one tensor, at most `MAX_OPEN_FILES`."""

    def __init__(self) -> None:
        self._open: dict[Path, io.FileIO] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def read(self, path: Path, start: int, buffer: np.ndarray, length: int, dtype: np.dtype) -> np.ndarray:
        """Read ``length`` elements at byte ``start`` into ``buffer`` and return them as ``dtype``."""
        with disk_errors(f"read {path}"):
            file = self._open.get(path)
            if file is None:
                for oldest in list(itertools.islice(self._open, max(0, len(self._open) - MAX_OPEN_FILES + 1))):
                    self._open.pop(oldest).close()
                file = self._open[path] = io.FileIO(path)
            raw = buffer[: length * dtype.itemsize]
            file.seek(start)
            read_exactly(file, raw)
        return raw.view(dtype)
