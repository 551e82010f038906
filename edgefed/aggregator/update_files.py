"""The files of updates: where each tensor is, and reading blocks of many files with few of them open.

A tensor has its values raw, or the change against the current unit encoded (`edgefed.kernels.compression`). Encoded
blocks are decoded as they are read.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgefed.aggregator.slices import read_rows, upload_tensors
from edgefed.aggregator.validate import read_exactly
from edgefed.disk import disk_errors
from edgefed.kernels.compression import CODECS, LARGEST_BLOCK, Codec, decode
from edgefed.protocol.frames import TensorEntry, read_header, split_update_name, tensor_size_bytes, update_name
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, TensorInfo, UnitInfo
from edgefed.protocol.ranks import with_rank
from edgefed.protocol.slices import are_rows, neuron_table

MAX_OPEN_FILES = 64
"""Open files per thread: a round may have more clients than a process can open files."""
_ABSENT = -1


class UpdateDamaged(Exception):
    """The file of an accepted update changed while it was read. Never leaves the server."""

    def __init__(self, client_id: str, path: Path):
        super().__init__(f"its file {path.name} changed while it was aggregated")
        self.client_id = client_id


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """Position of a client's tensor. ``codec``: how its change is encoded; None: its values are raw."""

    path: Path
    start: int
    codec: Codec | None = None


_ALL_CODECS = (None, *CODECS.values())


class UpdateIndex:
    """Position of each tensor in each update file, in 9 bytes per tensor and client; headers take many more."""

    def __init__(self, units: Sequence[UnitInfo], updates: Mapping[str, Path]):
        """Read the header of each file in ``updates`` {client_id: path}."""
        names = [update_name(unit.key, info.name) for unit in units if unit.trainable for info in upload_tensors(unit)]
        self._order = {name: at for at, name in enumerate(names)}
        self._paths = dict(updates)
        self._starts = {}
        self._codecs: dict[str, np.ndarray] = {}
        self._widths: dict[str, np.ndarray] = {}
        sliced = any(neuron_table(unit) for unit in units)
        for client_id, path in updates.items():
            starts = np.full(len(names), _ABSENT, dtype=np.int64)
            codecs = np.zeros(len(names), dtype=np.int8)
            widths = np.zeros(len(names) if sliced else 0, dtype=np.int32)
            for name, entry in read_header(path).items():
                key, tensor, codec = split_update_name(name)
                at = self._order[update_name(key, tensor)]
                starts[at], codecs[at] = entry.start, _ALL_CODECS.index(CODECS.get(codec))
                if sliced and entry.info.shape:
                    widths[at] = entry.info.shape[0]
            self._starts[client_id], self._codecs[client_id], self._widths[client_id] = starts, codecs, widths

    def expects(self, unit_key: str, name: str) -> bool:
        """Whether clients send a tensor in this round."""
        return update_name(unit_key, name) in self._order

    def has(self, client_id: str, unit: UnitInfo) -> bool:
        """Whether a client uploaded a unit."""
        return bool(self._starts[client_id][self._order[update_name(unit.key, unit.tensors[0].name)]] != _ABSENT)

    def locate(self, client_id: str, unit_key: str, name: str) -> TensorPlace:
        """Where a tensor is. Raises ValueError if the client did not upload it: the plan is wrong."""
        at = self._order.get(update_name(unit_key, name))
        start = int(self._starts[client_id][at]) if at is not None and client_id in self._starts else _ABSENT
        if start == _ABSENT:
            raise ValueError(f"the merge plan needs {unit_key!r} of client {client_id!r}, which did not upload it")
        assert at is not None, "it has a start"
        return TensorPlace(self._paths[client_id], start, _ALL_CODECS[self._codecs[client_id][at]])

    def rows(self, client_id: str, unit_key: str, num_rows: int) -> np.ndarray:
        """Rows of a table of ``num_rows`` neurons that a client uploaded, (W,). Raises ValueError, UpdateDamaged."""
        place = self.locate(client_id, unit_key, NEURON_INDEX)
        width = int(self._widths[client_id][self._order[update_name(unit_key, NEURON_INDEX)]])
        rows = read_rows(place.path, place.start, width)
        if len(rows) != width or not are_rows(rows, num_rows):
            raise UpdateDamaged(client_id, place.path)
        return rows


def values_info(
    name: str, entry: TensorEntry, header: Mapping[str, TensorEntry], units: Mapping[str, UnitInfo]
) -> TensorInfo:
    """A tensor of an update as its values are, also if it is encoded."""
    key, tensor, codec = split_update_name(name)
    if not codec:
        return entry.info
    info = next(info for info in units[key].tensors if info.name == tensor)
    shape = info.shape
    if tensor == NEURON_TABLE and neuron_table(units[key]) is not None:
        shape = (*header[update_name(key, NEURON_INDEX)].info.shape, *info.shape[1:])
    return TensorInfo(name=update_name(key, tensor), dtype=info.dtype, shape=shape)


KINDS = {"expert": "experts", "router": "routers", "dense": "dense"}


def sent_bytes(units: Sequence[UnitInfo], ranks: Mapping[Path, int]) -> dict[str, float]:
    """Metrics of a round: bytes received per kind of unit, and how many of them are encoded changes.

    ``ranks`` {path of an update: rank of its adapters, 0 for that of ``units``}. ``upload_ratio``: uncompressed bytes
    per byte received; only if some are encoded.
    """
    of_rank = {rank: {unit.key: unit for unit in with_rank(units, rank)} for rank in set(ranks.values())}
    sums, total, saved = Counter[str](), 0, 0
    for path, rank in ranks.items():
        header, by_key = read_header(path), of_rank[rank]
        for name, entry in header.items():
            key, _, codec = split_update_name(name)
            kind = "adapters" if key.endswith(":lora") else KINDS[by_key[key].kind]
            sums[f"bytes_up_{kind}"] += entry.size_bytes
            total += entry.size_bytes
            if codec:
                sums["bytes_up_changes"] += entry.size_bytes
                saved += tensor_size_bytes(values_info(name, entry, header, by_key)) - entry.size_bytes
    ratio = {"upload_ratio": (total + saved) / total} if sums["bytes_up_changes"] else {}
    return {name: float(size) for name, size in sums.items() if size} | ratio


class BlockFiles:
    """Open files of one tensor, at most `MAX_OPEN_FILES`."""

    def __init__(self) -> None:
        self._open: dict[Path, io.FileIO] = {}

    def __enter__(self) -> BlockFiles:
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

    def read_change(
        self, place: TensorPlace, count: int, begin: int, length: int, buffers: ChangeBuffers
    ) -> np.ndarray:
        """Decode ``length`` values from ``begin`` on of an encoded tensor of ``count`` values, float32.

        The result is valid until the next call with these ``buffers``.
        """
        codec = place.codec
        assert codec is not None, "the tensor is encoded"
        first = begin // codec.block * codec.block
        decoded = min(-(-(begin + length) // codec.block) * codec.block, count) - first
        start = place.start + first // codec.block * codec.block_bytes(codec.block)
        raw = self.read(place.path, start, buffers.raw, codec.size_bytes(decoded), np.dtype(np.uint8))
        values = buffers.values[:decoded]
        decode(codec, raw, values)
        return values[begin - first : begin - first + length]


class ChangeBuffers:
    """Buffers for `BlockFiles.read_change` of up to ``most`` values, of one thread."""

    def __init__(self, most: int) -> None:
        self.values = np.empty(most + 2 * LARGEST_BLOCK, dtype=np.float32)
        self.raw = np.empty(max(codec.size_bytes(len(self.values)) for codec in CODECS.values()), dtype=np.uint8)
