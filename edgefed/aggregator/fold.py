"""Aggregation at the end of a round: weighted means of units, block by block from the update files into new blobs.

    next = sum_c w_c x_c / sum_c w_c          per tensor, or per leading row where w_c is an array (E,)

Where a client sent a change d encoded, x_c = g + d with the current value g; d is decoded block by block.

The table of an expert's neurons is averaged row by row over the clients that sent the row, and a row that nobody sent
keeps its value (`edgefed.aggregator.slices`).

Clients are taken in the order of their ids and sums are float64 (`edgefed.kernels.fold`), so the result is bitwise
independent of the order of arrival and of restarts. Memory is a few blocks per thread for any model and number of
clients: files are read into one reused buffer and not mapped, because mapped pages count as resident memory. The
method's weights are given as `methods.interface.UnitMerge`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgefed.aggregator.adapter_products import adapter_groups, average_group
from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.server_optimizer import LARGEST, Stepping, UnitMoments
from edgefed.aggregator.slices import row_parts, row_runs, row_weights, sent_values, shares_of
from edgefed.aggregator.update_files import BlockFiles, ChangeBuffers, TensorPlace, UpdateDamaged, UpdateIndex
from edgefed.kernels.fold import FoldBackend
from edgefed.methods.interface import UnitMerge
from edgefed.protocol.frames import FLOAT_DTYPES, TensorEntry, encode_header, map_tensor, read_header, storage_dtype
from edgefed.protocol.messages import NEURON_TABLE, TensorInfo, UnitInfo

BLOCK_ELEMENTS = 64 * 1024
"""Elements per block: 512 KiB of float64 sums stay in the second-level cache while all clients are added."""


class FoldCancelled(Exception):
    """The server stops during aggregation, which the next start repeats. Never leaves the server."""


@dataclasses.dataclass(frozen=True)
class Robustness:
    """How lies are limited (`edgefed.aggregator.robust`).

    ``factors`` {(client_id, unit key): f}: x is taken as g + f (x - g), where g is the current value. ``combine``:
    (n, m) -> (m,), taken in place of the weighted mean where n >= ``min_clients``. ``make_noise`` makes what draws
    noise for one thread, n -> (n,); every element of a planned unit gets some, also where no client has sent it.
    ``products``: adapters are averaged as products (`edgefed.aggregator.adapter_products`), ordered for clients of a
    rank from ``smallest_rank`` on if that is not 0.
    """

    factors: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    combine: Callable[[np.ndarray], np.ndarray] | None = None
    min_clients: int = 1
    make_noise: Callable[[], Callable[[int], np.ndarray]] | None = None
    products: bool = False
    smallest_rank: int = 0


@dataclasses.dataclass(frozen=True)
class _Source:
    """Place of one client's tensor of ``count`` values, and the client's share: a float, or (E,) for rows.

    ``rows``: of a slice, the ascending rows of the global table that the client's tensor has.
    ``factor``: see `Robustness`.
    """

    client_id: str
    place: TensorPlace
    count: int
    share: float | np.ndarray
    rows: np.ndarray | None = None
    factor: float = 1.0

    @property
    def needs_old(self) -> bool:
        """Whether the current values are part of its own."""
        return self.factor < 1 or self.place.codec is not None

    def read(self, files: BlockFiles, begin: int, length: int, dtype: np.dtype[Any], scratch: _Scratch) -> np.ndarray:
        """Values ``begin`` to ``begin + length``: raw, or of an encoded tensor the change in float32."""
        if self.place.codec is not None:
            return files.read_change(self.place, self.count, begin, length, scratch.change)
        return files.read(self.place.path, self.place.start + begin * dtype.itemsize, scratch.raw, length, dtype)

    def share_of(self, row: int) -> float:
        """The share in one row."""
        return self.share if isinstance(self.share, float) else float(self.share[row])


def fold_round(
    units: Sequence[UnitInfo],
    plan: Mapping[str, UnitMerge],
    updates: Mapping[str, Path],
    blobs: BlobStore,
    backend: FoldBackend,
    *,
    robustness: Robustness | None = None,
    stepping: Stepping | None = None,
    threads: int | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    sent: Sequence[UnitInfo] | None = None,
) -> list[UnitInfo]:
    """Write the units of the next global model that differ from the current one. Returns them, in manifest order.

    ``sent``: the units with the tensors that clients send, if these are not all; the others stay as they are.
    With ``stepping``, a server optimizer makes its step from the aggregate, and the units of its new moments follow.

    Their blobs are durable when this returns. ``updates`` maps clients to validated update files; ``threads`` None
    means one per processor, at most four. Raises ValueError if the updates or units do not cover the plan,
    UpdateDamaged if a file has changed since its validation, DiskFull, StorageError, FoldCancelled.
    """
    unknown = plan.keys() - {unit.key for unit in units if unit.trainable}
    if unknown:
        raise ValueError(f"the merge plan names parts that are not trainable in this run: {sorted(unknown)[:4]}")
    index = UpdateIndex(sent or units, updates)
    planned = [unit for unit in units if unit.key in plan]
    scratches = threading.local()

    def fold_one(unit: UnitInfo) -> tuple[list[UnitInfo], list[UnitInfo]]:
        if not hasattr(scratches, "own"):
            scratches.own = _Scratch(backend, cancelled, robustness or Robustness())
        with UnitMoments(stepping, unit, blobs) if stepping else contextlib.nullcontext() as moments:
            scratches.own.moments = moments
            chunks = _unit_chunks(unit, plan[unit.key], index, blobs.path(unit.sha256), scratches.own)
            sha256, size_bytes = batch.put(chunks)
            more = moments.store(batch) if moments else None
        new = [] if sha256 == unit.sha256 else [msgspec.structs.replace(unit, sha256=sha256, size_bytes=size_bytes)]
        return new, [more] if more else []

    pool = concurrent.futures.ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="fold")
    with blobs.batch() as batch:
        try:
            folded = list(pool.map(fold_one, planned))
        finally:  # after an error no further unit starts; the batch is discarded once no thread uses it
            pool.shutdown(wait=True, cancel_futures=True)
    return [unit for each in zip(*folded, strict=True) for units in each for unit in units]


def default_threads() -> int:
    """One thread per processor, at most four."""
    return min(4, os.cpu_count() or 1)


class _Scratch:
    """The buffers of one thread."""

    def __init__(self, backend: FoldBackend, cancelled: Callable[[], bool], robustness: Robustness):
        self.backend = backend
        self.cancelled = cancelled
        self.robustness = robustness
        self.noise = None if robustness.make_noise is None else robustness.make_noise()
        self.moments: UnitMoments | None = None
        """Of the unit that is being folded, where a server optimizer makes the step."""
        self.sums = np.empty(BLOCK_ELEMENTS, dtype=np.float64)
        self.raw = np.empty(BLOCK_ELEMENTS * 8, dtype=np.uint8)
        self.old = np.empty(BLOCK_ELEMENTS * 8, dtype=np.uint8)
        self.out = np.empty(BLOCK_ELEMENTS * 8, dtype=np.uint8)
        self.change = ChangeBuffers(BLOCK_ELEMENTS)

    def narrow(self, sums: np.ndarray, dtype: str, out: np.ndarray) -> None:
        """Round ``sums`` into ``out``. A change of finite float32 values may lead out of float16, and stays finite."""
        if dtype == "F16":
            np.clip(sums, -LARGEST[dtype], LARGEST[dtype], out=sums)
        self.backend.narrow_block(sums, dtype, out)


def _unit_chunks(
    unit: UnitInfo, merge: UnitMerge, index: UpdateIndex, old_path: Path, scratch: _Scratch
) -> Iterator[bytes | memoryview]:
    """The bytes of the unit's next blob. A chunk is valid until the next one is requested."""
    weights = sorted(merge.weights, key=lambda pair: pair[0])
    old = read_header(old_path)
    yield encode_header(unit.tensors)
    sent = [info for info in unit.tensors if index.expects(unit.key, info.name)]
    found = {info.name: _sources(unit, info, weights, index, scratch) for info in sent}
    means = _product_means(unit, found, old_path, old, scratch) if scratch.robustness.products else {}
    for info in unit.tensors:
        sources, keep_rows = found.get(info.name, ([], None))
        if (mean := means.get(info.name)) is not None:
            yield from _tensor_chunks(info, sources, None, old_path, old[info.name], scratch, mean)
        elif sources and keep_rows is not None and info.name == NEURON_TABLE:
            yield from _table_chunks(info, sources, keep_rows, old_path, old[info.name], scratch)
        elif sources or (scratch.noise is not None and info.name in found):
            yield from _tensor_chunks(info, sources, keep_rows, old_path, old[info.name], scratch)
        else:
            yield from _copy_chunks(old_path, old[info.name], scratch)


def _sources(
    unit: UnitInfo, info: TensorInfo, weights: Sequence[tuple[str, float | np.ndarray]], index: UpdateIndex,
    scratch: _Scratch,
) -> tuple[list[_Source], np.ndarray | None]:  # fmt: skip
    """The clients' parts in a tensor, in the order of ``weights``, and the rows that keep their value (`shares_of`)."""
    if info.dtype not in FLOAT_DTYPES:
        raise ValueError(f"tensor {info.name!r} of {unit.key!r} is {info.dtype}: only floats are averaged")
    rows: list[np.ndarray | None] = [None] * len(weights)
    given = [weight for _, weight in weights]
    if info.name == NEURON_TABLE:
        found = [index.rows(client_id, unit.key, info.shape[0]) for client_id, _ in weights]
        given = [row_weights(float(weight), own, info.shape[0]) for weight, own in zip(given, found, strict=True)]
        rows = [*found]
    shares, keep_rows = shares_of(given, info)
    sources = [
        _Source(
            *(client_id, index.locate(client_id, unit.key, info.name), sent_values(info, own), share, own),
            factor=scratch.robustness.factors.get((client_id, unit.key), 1.0),
        )
        for (client_id, _), share, own in zip(weights, shares, rows, strict=True)
        if np.any(share)
    ]
    return sources, keep_rows


def _product_means(
    unit: UnitInfo, found: Mapping[str, tuple[list[_Source], np.ndarray | None]], old_path: Path,
    old: Mapping[str, TensorEntry], scratch: _Scratch,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The factors of adapters whose product is the mean of the clients' products, (n,) by the tensor's name."""
    infos, smallest = {info.name: info for info in unit.tensors}, scratch.robustness.smallest_rank
    means: dict[str, np.ndarray] = {}
    for group in adapter_groups(unit.tensors):
        sources, keep = found[group[0]]
        if len(sources) + (keep is not None and bool(keep.any())) < (1 if smallest else 2):
            continue  # one contributor's factors are those of the mean
        parts: list[tuple[float | np.ndarray, Sequence[_Source | None]]] = [
            (of[0].share, of) for of in zip(*(found[name][0] for name in group), strict=True)
        ]
        parts += [(keep.astype(np.float64), (None,) * len(group))] if keep is not None and keep.any() else []
        whole = (
            (share, [_whole(infos[name], s, old_path, old[name], scratch) for name, s in zip(group, of, strict=True)])
            for share, of in parts
        )
        if mean := average_group(whole, smallest):
            means |= {name: each.reshape(-1) for name, each in zip(group, mean, strict=True)}
    return means


def _whole(info: TensorInfo, source: _Source | None, old_path: Path, old: TensorEntry, scratch: _Scratch) -> np.ndarray:
    """A client's whole tensor, or the current one, float64; 0 in the rows of a table that the client lacks."""
    dtype = storage_dtype(info.dtype)
    rows, current = None if source is None else source.rows, map_tensor(old_path, old)
    current = (current if rows is None else current[rows]).reshape(-1)
    values = np.full(len(current), -0.0)
    with BlockFiles() as files:
        for begin in range(0, len(values), BLOCK_ELEMENTS):
            part, before = (array[begin : begin + BLOCK_ELEMENTS] for array in (values, current))
            if source is None:
                scratch.backend.fold_block(part, before, info.dtype, 1.0)
            else:
                raw = source.read(files, begin, len(part), dtype, scratch)
                _add(part, raw, before, source, 1.0, info.dtype, scratch.backend)
    if rows is None:
        return values.reshape(info.shape)
    whole = np.zeros(info.shape)
    whole[rows] = values.reshape(len(rows), -1)
    return whole


def _tensor_chunks(
    info: TensorInfo, sources: Sequence[_Source], keep_rows: np.ndarray | None, old_path: Path, old: TensorEntry,
    scratch: _Scratch, mean: np.ndarray | None = None,
) -> Iterator[memoryview]:  # fmt: skip
    """``mean`` (n,): the aggregate, where it is known already."""
    dtype, rule = storage_dtype(info.dtype), scratch.robustness
    count = old.size_bytes // dtype.itemsize
    row_elements = count // info.shape[0] if keep_rows is not None else count
    needs_old = (keep_rows is not None and bool(keep_rows.any())) or any(source.needs_old for source in sources)
    needs_old = needs_old or not sources or scratch.moments is not None
    combines = rule.combine is not None and len(sources) >= rule.min_clients
    step = max(1, BLOCK_ELEMENTS // len(sources) // 1024) * 1024 if combines else BLOCK_ELEMENTS  # see STEP_BLOCK
    with BlockFiles() as files:
        for begin in range(0, count, step):
            if scratch.cancelled():
                raise FoldCancelled("the server stops; the next start aggregates the round again")
            length = min(step, count - begin)
            sums, out = scratch.sums[:length], scratch.out[: length * dtype.itemsize].view(dtype)
            sums[:] = -0.0  # neutral element of addition: 0.0 would turn a mean of -0.0 into 0.0
            before = None
            if needs_old:
                before = files.read(old_path, old.start + begin * dtype.itemsize, scratch.old, length, dtype)
            rows = list(row_parts(begin, length, row_elements))
            matrix = np.empty((len(sources), length)) if combines else None
            if mean is not None:
                sums[:] = mean[begin : begin + length]
            for at, source in enumerate(sources if mean is None else ()):
                raw = source.read(files, begin, length, dtype, scratch)
                if matrix is not None:
                    matrix[at] = -0.0
                    _add(matrix[at], raw, before, source, 1.0, info.dtype, scratch.backend)
                    continue
                for part, row in rows:
                    if share := source.share_of(row):
                        old_part = None if before is None else before[part]
                        _add(sums[part], raw[part], old_part, source, share, info.dtype, scratch.backend)
            if not sources and before is not None:
                scratch.backend.fold_block(sums, before, info.dtype, 1.0)
            if scratch.noise is not None:
                sums += scratch.noise(length)
            if matrix is not None:
                for part, row in rows:
                    sums[part] = _combined(matrix[:, part], [source.share_of(row) for source in sources], rule)
            if scratch.moments is not None and before is not None:
                kept = None if keep_rows is None else keep_rows[np.arange(begin, begin + length) // row_elements]
                scratch.moments.step(info, begin, before, sums, kept, scratch.backend)
            scratch.narrow(sums, info.dtype, out)
            if keep_rows is not None and before is not None:
                for part, row in rows:
                    if keep_rows[row]:
                        out[part] = before[part]
            yield memoryview(out.data).cast("B")


def _table_chunks(
    info: TensorInfo, sources: Sequence[_Source], keep_rows: np.ndarray, old_path: Path, old: TensorEntry,
    scratch: _Scratch,
) -> Iterator[memoryview]:  # fmt: skip
    """As `_tensor_chunks`, for a neuron table of which each source has some rows."""
    dtype = storage_dtype(info.dtype)
    num_rows, columns = info.shape
    if not 0 < columns <= BLOCK_ELEMENTS:
        raise ValueError(f"a neuron has {columns} numbers: expected 1..{BLOCK_ELEMENTS}")
    step, needs_old = BLOCK_ELEMENTS // columns, any(source.needs_old for source in sources)
    with BlockFiles() as files:
        for begin in range(0, num_rows, step):
            if scratch.cancelled():
                raise FoldCancelled("the server stops; the next start aggregates the round again")
            end = min(begin + step, num_rows)
            length = (end - begin) * columns
            sums, out = scratch.sums[:length], scratch.out[: length * dtype.itemsize].view(dtype)
            sums[:] = -0.0
            before = None
            if needs_old or scratch.moments is not None or keep_rows[begin:end].any():
                start = old.start + begin * columns * dtype.itemsize
                before = files.read(old_path, start, scratch.old, length, dtype)
            for source in sources:
                assert source.rows is not None, "a source of a table has rows"
                assert isinstance(source.share, np.ndarray), "and a share for each row"
                first, last = np.searchsorted(source.rows, (begin, end)).tolist()
                if first == last:
                    continue
                raw = source.read(files, first * columns, (last - first) * columns, dtype, scratch)
                rows = source.rows[first:last]
                for at, stop in row_runs(rows, source.share):
                    part = sums[(rows[at] - begin) * columns : (rows[stop - 1] + 1 - begin) * columns]
                    share = float(source.share[rows[at]])
                    if share:
                        block, old_rows = raw[at * columns : stop * columns], None
                        if before is not None:
                            old_rows = before[(rows[at] - begin) * columns : (rows[stop - 1] + 1 - begin) * columns]
                        _add(part, block, old_rows, source, share, info.dtype, scratch.backend)
            if scratch.moments is not None and before is not None:
                kept = np.repeat(keep_rows[begin:end], columns)
                scratch.moments.step(info, begin * columns, before, sums, kept, scratch.backend)
            scratch.narrow(sums, info.dtype, out)
            if before is not None:
                mask = keep_rows[begin:end]
                out.reshape(-1, columns)[mask] = before.reshape(-1, columns)[mask]
            yield memoryview(out.data).cast("B")


def _add(
    sums: np.ndarray, raw: np.ndarray, before: np.ndarray | None, source: _Source, share: float, dtype: str,
    backend: FoldBackend,
) -> None:  # fmt: skip
    """``sums += share (g + f (x - g))``; ``raw`` is x, or x - g if the source is encoded.

    Raises UpdateDamaged for a value that is not finite.
    """
    encoded = source.place.codec is not None
    if backend.fold_block(sums, raw, "F32" if encoded else dtype, share * source.factor) >= 0:
        raise UpdateDamaged(source.client_id, source.place.path)
    if source.needs_old:
        assert before is not None, "the current values were read"
        backend.fold_block(sums, before, dtype, share if encoded else share * (1 - source.factor))


def _combined(values: np.ndarray, shares: Sequence[float], rule: Robustness) -> np.ndarray:
    """The robust mean of the clients with a share, or their weighted mean if they are too few; ``values`` (n, m)."""
    present = [at for at, share in enumerate(shares) if share]
    if rule.combine is not None and len(present) >= rule.min_clients:
        return rule.combine(values[present])
    mean: np.ndarray = np.asarray(shares)[present] @ values[present]
    return mean


def _copy_chunks(path: Path, entry: TensorEntry, scratch: _Scratch) -> Iterator[memoryview]:
    with BlockFiles() as files:
        for begin in range(0, entry.size_bytes, scratch.out.nbytes):
            length = min(scratch.out.nbytes, entry.size_bytes - begin)
            yield files.read(path, entry.start + begin, scratch.out, length, np.dtype(np.uint8)).data
