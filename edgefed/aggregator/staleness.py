"""Late updates: trained from the model of an earlier round, and counted in a later one (buffered asynchronous rounds).

An update x of a client that trained from g_b, the model of tau rounds ago, moves the current model g by

    x' = g + s(tau) (x - g_b),    s(tau) = 1 / sqrt(1 + tau)

and x' then goes through the round as any update does. With a quorum of K updates this is the buffer of FedBuff (Nguyen
et al., arXiv 2106.06639, algorithm 1), and s is its staleness scaling (section 5). Ours: the weights of the run's
method in place of the plain mean of the buffer, and a client counts once in a buffer.

Of an encoded change d = x - g_b, x' = g + s(tau) d. x' is written as a file of its own, in the unit's storage type.
Files are rebased independently, so what is aggregated does not depend on the order of arrival within a buffer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.fold import BLOCK_ELEMENTS
from edgefed.aggregator.records import UpdateRecord
from edgefed.aggregator.repair import blob_problem
from edgefed.aggregator.slices import read_rows
from edgefed.aggregator.update_files import BlockFiles, ChangeBuffers, TensorPlace, values_info
from edgefed.disk import disk_errors
from edgefed.kernels.compression import CODECS
from edgefed.kernels.fold import FoldBackend
from edgefed.protocol.frames import (
    FLOAT_DTYPES,
    TensorEntry,
    encode_header,
    read_header,
    split_update_name,
    storage_dtype,
    update_name,
)
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, TensorInfo, UnitInfo
from edgefed.protocol.slices import neuron_table


class BaseLost(Exception):
    """The model that a late update was trained from is gone or damaged. Never leaves the server."""


def staleness_weight(staleness: int) -> float:
    """s(tau), the share of its change that an update keeps after ``staleness`` rounds."""
    return 1 / math.sqrt(1 + staleness)


def buffer_of(updates: Sequence[UpdateRecord]) -> list[UpdateRecord]:
    """One update of each client, its oldest, sorted by client. The others wait for the next round."""
    first: dict[str, UpdateRecord] = {}
    for update in sorted(updates, key=lambda update: update.server_round):
        first.setdefault(update.client_id, update)
    return [first[client_id] for client_id in sorted(first)]


@dataclasses.dataclass(frozen=True)
class Rebasing:
    """From one model to a later one: ``base`` g_b and ``units`` g, with g_b ``staleness`` rounds older.

    ``base`` is None if it is not stored any more. Units of ``left_out`` are not aggregated, and are copied.
    """

    base: Sequence[UnitInfo] | None
    units: Sequence[UnitInfo]
    staleness: int
    left_out: Sequence[str] = ()


def rebase_update(path: Path, target: Path, how: Rebasing, blobs: BlobStore, backend: FoldBackend) -> None:
    """Write x' of the update file ``path`` to ``target``. Raises BaseLost, DiskFull, StorageError."""
    if how.base is None:
        raise BaseLost("the model that it was trained from is not stored any more")
    before, now = ({unit.key: unit for unit in model} for model in (how.base, how.units))
    header = read_header(path)
    places: dict[str, tuple[Path, dict[str, TensorEntry]]] = {}

    current = {unit.sha256 for unit in how.units}  # checked before

    def place(unit: UnitInfo) -> tuple[Path, dict[str, TensorEntry]]:
        if unit.sha256 not in places:
            blob = blobs.path(unit.sha256)
            if unit.sha256 not in current and (problem := blob_problem(blob, unit.sha256, unit.size_bytes)):
                raise BaseLost(f"{unit.key!r} of the model that it was trained from {problem}")
            places[unit.sha256] = blob, read_header(blob)
        return places[unit.sha256]

    with disk_errors(f"write {target}"), target.open("wb") as file, BlockFiles() as files:
        sent = {name: values_info(name, entry, header, now) for name, entry in header.items()}
        file.write(encode_header(list(sent.values())))
        changes = ChangeBuffers(BLOCK_ELEMENTS)
        buffers = [np.empty(BLOCK_ELEMENTS * 8, dtype=np.uint8) for _ in range(2)]
        for name, entry in header.items():
            key, tensor, codec = split_update_name(name)
            info, encoded = sent[name], TensorPlace(path, entry.start, CODECS.get(codec))
            models = [] if key in how.left_out else [place(now[key]), *([] if codec else [place(before[key])])]
            if tensor == NEURON_INDEX or info.dtype not in FLOAT_DTYPES:
                models = []
            rows = None
            if tensor == NEURON_TABLE and neuron_table(now[key]) is not None:
                index = header[update_name(key, NEURON_INDEX)]
                rows = read_rows(path, index.start, index.info.shape[0])
            dtype, weight = storage_dtype(info.dtype), staleness_weight(how.staleness)
            for at, model_at, length in _spans(info, rows):
                sums = np.zeros(length)
                if codec:
                    out = buffers[0][: length * dtype.itemsize].view(dtype)
                    values = files.read_change(encoded, math.prod(info.shape), at, length, changes)
                    backend.fold_block(sums, values, "F32", weight)
                else:
                    out = files.read(path, entry.start + at * dtype.itemsize, buffers[0], length, dtype)
                    if models:
                        backend.fold_block(sums, out, info.dtype, weight)
                for (blob, tensors), share in zip(models, (1.0, -weight), strict=False):
                    start = tensors[tensor].start + model_at * dtype.itemsize
                    raw = files.read(blob, start, buffers[1], length, dtype)
                    backend.fold_block(sums, raw, info.dtype, share)
                if models or codec:
                    backend.narrow_block(sums, info.dtype, out)
                file.write(out.data)


def _spans(info: TensorInfo, rows: np.ndarray | None) -> Iterator[tuple[int, int, int]]:
    """The elements of an update's tensor in blocks: (first in the update, first in the model, number).

    ``rows`` of a neuron table: the model's rows that the update has, (W,).
    """
    total = math.prod(info.shape)
    if rows is None:
        for at in range(0, total, BLOCK_ELEMENTS):
            yield at, at, min(BLOCK_ELEMENTS, total - at)
        return
    columns = info.shape[1]
    step = max(1, BLOCK_ELEMENTS // columns)
    at = 0
    while at < len(rows):
        stop = at + 1
        while stop < len(rows) and stop - at < step and rows[stop] == rows[stop - 1] + 1:
            stop += 1
        yield at * columns, int(rows[at]) * columns, (stop - at) * columns
        at = stop
