"""Steps of the server: the aggregated change of a round is a direction, and few values may move at a time.

With g the current value, x the aggregate of the round (weighted or robust mean, noise included) and Delta = x - g:

    none        g' = x
    momentum    v' = mu v + Delta,  g' = g + eta (Delta + mu v')                  Nesterov's momentum, as in DiLoCo
    adam        m' = mu m + (1 - mu) Delta,  s' = beta_2 s + (1 - beta_2) Delta^2
                g' = g + eta m' / (sqrt(s') + tau)                                FedAdam

DiLoCo: Douillard et al., arXiv 2311.08105, algorithm 1, with the optimizer of its section 3. FedAdam: Reddi et al.,
arXiv 2003.00295, algorithm 2, without bias correction as there, and s begins at tau^2.

With `Stepping.limits`, the model makes a part of the step, so that devices download little (`protocol.changes`): the
longest steps alone, a share of those of each block of the fold, or each value in whole steps of its block, up to
`levels`. With u the step as above, C that part and r the residual:

    v = u + r        g' = g + C(v)        r' = v - (g' - g)

So what is left out moves in a later round, and so does what rounding to the storage type takes away: error feedback, as
on the devices (`agent.compression`). Without limits, as in the last round, v = u and residuals are dropped: clients
have trained from g and repeated part of what r holds, so adding all of it would overshoot.

What no client has trained in a round (a unit, a router row, a neuron) does not move, and its moments stay as they are:
a change that nobody measured is unknown, and not 0. That is ours; experts need it, since a round trains some of them.

Moments are float32 and steps are float64; residuals are as precise as the weights. Those of a unit are a blob of their
own (`moments_unit`), stored in the same transaction as the round. So they survive a restart, and a round that is undone
takes them along. Blocks are read and written where the fold has its own, so memory does not grow. The step depends on
the aggregate alone, which does not depend on the order of arrival.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from edgefed.aggregator.blobs import BlobBatch, BlobStore
from edgefed.aggregator.records import MOMENTS
from edgefed.aggregator.repair import blob_problem
from edgefed.disk import READ_BYTES, FileRange, copy_range, disk_errors, write_all
from edgefed.kernels.fold import FoldBackend
from edgefed.protocol.changes import StepLimits, to_steps
from edgefed.protocol.frames import (
    FLOAT_DTYPES,
    array_bytes,
    encode_header,
    narrow,
    read_header,
    storage_dtype,
    tensor_size_bytes,
    widen,
)
from edgefed.protocol.messages import TensorInfo, UnitInfo
from edgefed.protocol.server_optimizer import ServerOptimizer

logger = logging.getLogger(__name__)

SQUARE, RESIDUAL = ".square", ".residual"
"""Ends of the names of a second moment and of a residual, after the name of the tensor."""
LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38, "F32": 3.4028234663852886e38, "F64": 1.7976931348623157e308}
"""Largest finite value of each dtype."""
_FILL_ELEMENTS = 64 * 1024
LEAST_SPARSE = 4096
"""Smaller tensors move as a whole: they are few bytes."""


def moments_unit(unit: UnitInfo, optimizer: ServerOptimizer | None, limits: StepLimits) -> UnitInfo:
    """The unit of the moments and residuals of ``unit``, not stored yet: up to three tensors for each of its own."""
    ends = () if optimizer is None else ("",) if optimizer.kind == "momentum" else ("", SQUARE)
    tensors = tuple(
        TensorInfo(name=f"{info.name}{end}", dtype=_dtype(info.dtype) if end == RESIDUAL else "F32", shape=info.shape)
        for info in unit.tensors
        for end in (*ends, *(() if limits.whole or math.prod(info.shape) < LEAST_SPARSE else (RESIDUAL,)))
        if info.dtype in FLOAT_DTYPES
    )
    return UnitInfo(key=f"{MOMENTS}{unit.key}", kind="moments", trainable=False, tensors=tensors)


def undone_moments(before: Mapping[str, UnitInfo], now: Mapping[str, UnitInfo]) -> list[UnitInfo]:
    """The moments to store where the model ``before`` replaces that of ``now``; those that had none then lose them."""
    nothing = {key: msgspec.structs.replace(unit, sha256="", size_bytes=0) for key, unit in now.items()}
    wanted = {**nothing, **{key: before[key] for key in before.keys() & now.keys()}}
    return [wanted[key] for key in now if wanted[key].sha256 != now[key].sha256]


def _dtype(dtype: str) -> str:
    """The dtype of residuals of values of ``dtype``."""
    return "F32" if dtype in ("F32", "F64") else "BF16"


@dataclasses.dataclass(frozen=True)
class Stepping:
    """What steps of a round are made with; ``moments`` are the current ones, {key of the moments: unit}.

    ``optimizer`` None: the step is the aggregated change. ``limits``: what of it the model makes in the round.
    ``squares``: what steps have left, {unit key: squared L2 norms of v and r'}; only with limits.
    """

    optimizer: ServerOptimizer | None
    moments: Mapping[str, UnitInfo]
    limits: StepLimits = StepLimits()
    squares: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def needed(self) -> bool:
        """Whether steps differ from the aggregated changes."""
        return self.optimizer is not None or not self.limits.whole or bool(self.moments)

    def metrics(self) -> dict[str, float]:
        """Metrics of a round: norms of the model's step with residuals, and of the residuals that it leaves."""
        if not self.squares:
            return {}
        step, residual = np.sqrt(sum(self.squares[key] for key in sorted(self.squares))).tolist()
        return {"model_step_norm": step, "model_residual_norm": residual}


class UnitMoments:
    """The moments and residuals of one unit while it is folded, in a temporary file. A context; not thread-safe."""

    def __init__(self, how: Stepping, unit: UnitInfo, blobs: BlobStore):
        """Raises DiskFull, StorageError."""
        self._how, self._of, self._unit = how, unit.key, moments_unit(unit, how.optimizer, how.limits)
        self._squares, self._stepped = np.zeros(2), False
        old = _usable(how.moments.get(self._unit.key), blobs)
        with disk_errors("write moments"):
            self._path, file = blobs.open_temporary()
            file.close()
            self._fill(old)
            self._file = self._path.open("r+b", buffering=0)
        self._entries = read_header(self._path)
        self._had = old is not None

    def _fill(self, old: Path | None) -> None:
        """Write what the blob ``old`` has, and first values of everything else."""
        before = {} if old is None else read_header(old)
        with self._path.open("wb", buffering=0) as file:
            write_all(file, encode_header(self._unit.tensors))
            for info in self._unit.tensors:
                entry = before.get(info.name)
                if old is not None and entry is not None and entry.info == info:
                    copy_range(FileRange(old, entry.start, entry.size_bytes), file)
                    continue
                first = self._how.optimizer.epsilon**2 if self._how.optimizer and info.name.endswith(SQUARE) else 0.0
                values = array_bytes(narrow(np.full(_FILL_ELEMENTS, first, np.float32), info.dtype))
                left = tensor_size_bytes(info)
                while left:
                    part = values[:left]
                    write_all(file, part)
                    left -= len(part)

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
        self._stepped = True
        step = sums - before
        if self._how.optimizer is not None:
            step = self._optimized(self._how.optimizer, info.name, begin, step, kept)
        residual = info.name + RESIDUAL
        limited = residual in self._entries
        if limited:
            step += self._read(residual, begin, len(sums))
        free = np.ones(len(sums), dtype=bool) if kept is None else ~kept
        part = _part(np.where(free, step, 0.0), self._how.limits) if limited else step
        most = LARGEST[info.dtype]
        np.clip(before + part, -most, most, out=sums, where=free)
        if limited:
            out, after = np.empty_like(raw), np.zeros(len(sums))
            backend.narrow_block(sums, info.dtype, out)
            backend.fold_block(after, out, info.dtype, 1.0)
            left = before + step - after
            self._write(residual, begin, left, kept)
            self._squares += (float(step[free] @ step[free]), float(left[free] @ left[free]))

    def _optimized(
        self, how: ServerOptimizer, name: str, begin: int, delta: np.ndarray, kept: np.ndarray | None
    ) -> np.ndarray:
        """The optimizer's step from the aggregated change ``delta`` (n,)."""
        first = self._read(name, begin, len(delta))
        if how.kind == "momentum":
            first = how.momentum * first + delta
            move: np.ndarray = how.rate * (delta + how.momentum * first)
        else:
            square = self._read(name + SQUARE, begin, len(delta))
            first = how.momentum * first + (1 - how.momentum) * delta
            square = how.beta2 * square + (1 - how.beta2) * delta**2
            move = how.rate * first / (np.sqrt(square) + how.epsilon)
            self._write(name + SQUARE, begin, square, kept)
        self._write(name, begin, first, kept)
        return move

    def store(self, batch: BlobBatch) -> UnitInfo | None:
        """The unit of the new moments, in ``batch``; without a hash if none are left; None if no step was made."""
        if not self._stepped:
            return None
        if not self._how.limits.whole:
            self._how.squares[self._of] = self._squares
        if not self._unit.tensors:
            return self._unit if self._had else None
        with self._path.open("rb") as file:
            sha256, size_bytes = batch.put(iter(lambda: file.read(READ_BYTES), b""))
        return msgspec.structs.replace(self._unit, sha256=sha256, size_bytes=size_bytes)

    def _read(self, name: str, begin: int, count: int) -> np.ndarray:
        entry = self._entries[name]
        dtype = storage_dtype(entry.info.dtype)
        with disk_errors("read moments"):
            self._file.seek(entry.start + dtype.itemsize * begin)
            raw = np.frombuffer(self._file.read(dtype.itemsize * count), dtype=dtype)
        return widen(raw, entry.info.dtype).astype(np.float64)

    def _write(self, name: str, begin: int, values: np.ndarray, kept: np.ndarray | None) -> None:
        if kept is not None:
            values = np.where(kept, self._read(name, begin, len(values)), values)
        entry = self._entries[name]
        raw = narrow(np.clip(values, -LARGEST["BF16"], LARGEST["BF16"]).astype(np.float32), entry.info.dtype)
        with disk_errors("write moments"):
            self._file.seek(entry.start + raw.itemsize * begin)
            write_all(self._file, array_bytes(raw))


def _part(step: np.ndarray, limits: StepLimits) -> np.ndarray:
    """What of a ``step`` (n,) the model makes: whole steps, or the longest ones; of equally long ones the first."""
    if limits.levels:
        return to_steps(step, limits.levels)
    lengths, count = np.abs(step), math.ceil(limits.share * len(step))
    least = np.partition(lengths, len(step) - count)[len(step) - count]
    longest: np.ndarray = lengths > least
    longest[np.flatnonzero(lengths == least)[: count - np.count_nonzero(longest)]] = least > 0
    return np.where(longest, step, -0.0)  # x + 0.0 is not x where x is -0.0


def _usable(unit: UnitInfo | None, blobs: BlobStore) -> Path | None:
    """The file of stored moments; None if there are none, or if the disk has damaged them, which is logged."""
    if unit is None:
        return None
    path = blobs.path(unit.sha256)
    if problem := blob_problem(path, unit.sha256, unit.size_bytes):
        logger.error("the server optimizer begins anew for %r: its file %s", unit.key.removeprefix(MOMENTS), problem)
        return None
    return path
