"""Optimizers at the server: the aggregated change of a round is a direction, from which a step is made.

With g the current value, x the aggregate of the round (weighted or robust mean, noise included) and Delta = x - g:

    none        g' = x
    momentum    v' = mu v + Delta,  g' = g + eta (Delta + mu v')                  Nesterov's momentum, as in DiLoCo
    adam        m' = mu m + (1 - mu) Delta,  s' = beta_2 s + (1 - beta_2) Delta^2
                g' = g + eta m' / (sqrt(s') + tau)                                FedAdam

DiLoCo: Douillard et al., arXiv 2311.08105, algorithm 1, with the optimizer of its section 3. FedAdam: Reddi et al.,
arXiv 2003.00295, algorithm 2, without bias correction as there, and s begins at tau^2.

What no client has trained in a round (a unit, a router row, a neuron) does not move, and its moments stay as they are:
a change that nobody measured is unknown, and not 0. That is ours; experts need it, since a round trains some of them.

Moments are float32 and steps are float64. The moments of a unit are a blob of their own (`moments_unit`), stored in the
same transaction as the round. So they survive a restart, and a round that is undone takes its moments along. Blocks are
read and written where the fold has its own, so memory does not grow. The step depends on the aggregate alone, which
does not depend on the order of arrival.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from edgefed.aggregator.blobs import BlobBatch, BlobStore
from edgefed.aggregator.records import MOMENTS
from edgefed.aggregator.repair import blob_problem
from edgefed.disk import READ_BYTES, disk_errors
from edgefed.kernels.fold import FoldBackend
from edgefed.protocol.frames import FLOAT_DTYPES, encode_header, read_header
from edgefed.protocol.messages import TensorInfo, UnitInfo
from edgefed.protocol.server_optimizer import ServerOptimizer

logger = logging.getLogger(__name__)

SQUARE = ".square"
"""End of the name of a second moment, after the name of the tensor."""
_LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38, "F32": 3.4028234663852886e38, "F64": 1.7976931348623157e308}
_FILL_ELEMENTS = 64 * 1024


def moments_unit(unit: UnitInfo, optimizer: ServerOptimizer) -> UnitInfo:
    """The unit of the moments of ``unit``, not stored yet: a float32 tensor or two for each of its tensors."""
    ends = ("",) if optimizer.kind == "momentum" else ("", SQUARE)
    tensors = tuple(
        TensorInfo(name=f"{info.name}{end}", dtype="F32", shape=info.shape)
        for info in unit.tensors
        for end in ends
        if info.dtype in FLOAT_DTYPES
    )
    return UnitInfo(key=f"{MOMENTS}{unit.key}", kind="moments", trainable=False, tensors=tensors)


def undone_moments(before: Mapping[str, UnitInfo], now: Mapping[str, UnitInfo]) -> list[UnitInfo]:
    """The moments to store where the model ``before`` replaces that of ``now``; those that had none then lose them."""
    nothing = {key: msgspec.structs.replace(unit, sha256="", size_bytes=0) for key, unit in now.items()}
    wanted = {**nothing, **{key: before[key] for key in before.keys() & now.keys()}}
    return [wanted[key] for key in now if wanted[key].sha256 != now[key].sha256]


@dataclasses.dataclass(frozen=True)
class Stepping:
    """What steps of a round are made with; ``moments`` are the current ones, {key of the moments: unit}."""

    optimizer: ServerOptimizer
    moments: Mapping[str, UnitInfo]


class UnitMoments:
    """The moments of one unit while it is folded, in a temporary file. A context; not thread-safe."""

    def __init__(self, how: Stepping, unit: UnitInfo, blobs: BlobStore):
        """Raises DiskFull, StorageError."""
        self._optimizer, self._unit = how.optimizer, moments_unit(unit, how.optimizer)
        self._stepped = False
        with disk_errors("write moments"):
            self._path, file = blobs.open_temporary()
            file.close()
            self._fill(_usable(how.moments.get(self._unit.key), self._unit.tensors, blobs))
            self._file: BinaryIO = self._path.open("r+b", buffering=0)
        self._entries = read_header(self._path)

    def _fill(self, old: Path | None) -> None:
        if old is not None:
            shutil.copyfile(old, self._path)
            return
        with self._path.open("wb") as file:
            file.write(encode_header(self._unit.tensors))
            for info in self._unit.tensors:
                first = self._optimizer.epsilon**2 if info.name.endswith(SQUARE) else 0.0
                left = math.prod(info.shape)
                while left > 0:
                    file.write(np.full(min(left, _FILL_ELEMENTS), first, dtype=np.float32).data)
                    left -= _FILL_ELEMENTS

    def __enter__(self) -> UnitMoments:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def step(
        self, info: TensorInfo, begin: int, raw: np.ndarray, sums: np.ndarray, kept: np.ndarray | None,
        backend: FoldBackend,
    ) -> None:  # fmt: skip
        """Turn the aggregate ``sums``, elements from ``begin`` of a tensor, (n,) float64, into the next values.

        ``raw``: the current ones as stored, (n,). ``kept`` (n,) bool: elements that stay as they are.
        """
        before = np.zeros(len(sums))
        backend.fold_block(before, raw, info.dtype, 1.0)
        how, self._stepped = self._optimizer, True
        delta = sums - before
        first = self._read(info.name, begin, len(sums))
        if how.kind == "momentum":
            first = how.momentum * first + delta
            move = how.rate * (delta + how.momentum * first)
        else:
            square = self._read(info.name + SQUARE, begin, len(sums))
            first = how.momentum * first + (1 - how.momentum) * delta
            square = how.beta2 * square + (1 - how.beta2) * delta**2
            move = how.rate * first / (np.sqrt(square) + how.epsilon)
            self._write(info.name + SQUARE, begin, square, kept)
        self._write(info.name, begin, first, kept)
        most = _LARGEST[info.dtype]
        np.clip(before + move, -most, most, out=sums, where=True if kept is None else ~kept)

    def store(self, batch: BlobBatch) -> UnitInfo | None:
        """The unit of the new moments, in ``batch``; None if no step was made."""
        if not self._stepped:
            return None
        self._file.seek(0)
        sha256, size_bytes = batch.put(iter(lambda: self._file.read(READ_BYTES), b""))
        return msgspec.structs.replace(self._unit, sha256=sha256, size_bytes=size_bytes)

    def _read(self, name: str, begin: int, count: int) -> np.ndarray:
        with disk_errors("read moments"):
            self._file.seek(self._entries[name].start + 4 * begin)
            return np.frombuffer(self._file.read(4 * count), dtype=np.float32).astype(np.float64)

    def _write(self, name: str, begin: int, values: np.ndarray, kept: np.ndarray | None) -> None:
        if kept is not None:
            values = np.where(kept, self._read(name, begin, len(values)), values)
        most = _LARGEST["F32"]
        with disk_errors("write moments"):
            self._file.seek(self._entries[name].start + 4 * begin)
            self._file.write(np.clip(values, -most, most).astype(np.float32).data)


def _usable(unit: UnitInfo | None, tensors: Sequence[TensorInfo], blobs: BlobStore) -> Path | None:
    """The file of stored moments; None if there are none, or if the disk has damaged them, which is logged."""
    if unit is None or unit.tensors != tuple(tensors):
        return None
    path = blobs.path(unit.sha256)
    if problem := blob_problem(path, unit.sha256, unit.size_bytes):
        logger.error("the server optimizer begins anew for %r: its file %s", unit.key.removeprefix(MOMENTS), problem)
        return None
    return path
