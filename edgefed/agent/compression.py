"""Compressed updates with error feedback: what a device sends is a change, and what that leaves out is not lost.

With g the global unit that a round began with, x what was trained and r the residual of the unit,

    v = x - g + r        sent as c = encode(v)        r' = v - decode(c)

r' is written beside the update and becomes r when the server has acknowledged the update: one write of the journal
does both, so a killed device loses no residual and counts none twice. The residual of an expert that is not on the
device any more is dropped, and so is one whose bytes the disk has changed: each has a checksum.

Error feedback is that of Seide et al. (Interspeech 2014) and Karimireddy et al. (arXiv 1901.09847).

A tensor is sent as it is where encoding saves nothing, and where the device no longer has g.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgefed.agent.journal import Journal
from edgefed.disk import disk_errors, sync_file
from edgefed.errors import InvalidUpdate, TrainingDiverged
from edgefed.hardware.memory import format_bytes
from edgefed.kernels.compression import CODECS, Codec, decode, encode
from edgefed.protocol.alternation import LORA_A
from edgefed.protocol.frames import (
    ENCODED_DTYPE,
    FLOAT_DTYPES,
    TensorEntry,
    array_bytes,
    encode_header,
    map_tensor,
    narrow,
    read_header,
    split_update_name,
    update_name,
    widen,
)
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, Manifest, TensorInfo, UnitInfo
from edgefed.protocol.ranks import is_factor
from edgefed.protocol.slices import UnitSlice, neuron_table
from edgefed.protocol.trainer import TrainedUpdate

logger = logging.getLogger("edgefed.agent")

AUTO_SECONDS = 30.0
"""``auto`` takes the codec with the most bits whose upload takes no longer."""
USUAL_UPLINK_BYTES_PER_S = 15e6 / 8
"""Rate of an uplink that has not been measured: 15 Mbit/s, as cable has at home."""
CHUNK_VALUES = 1 << 20
"""Values that are encoded at a time; a multiple of every block."""

CHECKSUMS = "checksums"
"""Last tensor of a file of residuals, (n,) int64: CRC-32 of name, dtype, shape and bytes of each of the others."""

FindBase = Callable[[UnitInfo], Path | None]
"""The file of the unit that a round began with, or of the slice of it that the device has; None if it is gone."""


@dataclasses.dataclass(frozen=True)
class Compressed:
    """An update after compression.

    Both norms are L2, over all encoded tensors: ``change_norm`` of the change with its residual, ``residual_norm`` of
    what encoding left out. ``codec`` is "none" if nothing was encoded.
    """

    codec: str
    whole_bytes: int
    size_bytes: int
    change_norm: float = 0.0
    residual_norm: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Numbers for the ledger; none without compression."""
        if self.codec == "none":
            return {}
        return {
            "update_bytes_uncompressed": float(self.whole_bytes),
            "compression_ratio": self.whole_bytes / max(1, self.size_bytes),
            "change_norm": self.change_norm,
            "residual_norm": self.residual_norm,
        }


def choose_codec(requested: str, whole_bytes: int, up_bytes_per_s: float | None) -> Codec | None:
    """The codec for an update of ``whole_bytes`` (4 bytes a value); None sends it as it is.

    ``requested`` is `RunConfig.compression`. ``up_bytes_per_s`` None: not measured yet.
    """
    if requested != "auto":
        return CODECS.get(requested)
    rate = up_bytes_per_s or USUAL_UPLINK_BYTES_PER_S
    if whole_bytes <= rate * AUTO_SECONDS:
        return None
    fitting = (codec for codec in CODECS.values() if codec.size_bytes(whole_bytes // 4) <= rate * AUTO_SECONDS)
    return next(fitting, CODECS["topk"])


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of an update. ``codec`` None: it is copied, and has no residual.

    ``base`` and ``residual``: values of g and r in the order of the tensor, flat; no ``residual`` is 0.
    """

    name: str
    entry: TensorEntry
    codec: Codec | None = None
    base: np.ndarray | None = None
    residual: np.ndarray | None = None

    @property
    def sent(self) -> TensorInfo:
        """The tensor in the frame that is sent."""
        if self.codec is None:
            return self.entry.info
        name = update_name(*split_update_name(self.name)[:2], self.codec.name)
        return TensorInfo(
            name=name, dtype=ENCODED_DTYPE, shape=(self.codec.size_bytes(math.prod(self.entry.info.shape)),)
        )

    @property
    def left(self) -> TensorInfo:
        """Its residual, or the index of a slice, in the file of residuals."""
        info = self.entry.info
        dtype = info.dtype if self.codec is None else _residual_dtype(info.dtype)
        return TensorInfo(name=self.name, dtype=dtype, shape=info.shape)


def _residual_dtype(dtype: str) -> str:
    """As precise as the weights themselves: with fewer bits, small changes would vanish in a large residual."""
    return "F32" if dtype in ("F32", "F64") else "BF16"


def compress_update(
    path: Path,
    units: Mapping[str, UnitInfo],
    find_base: FindBase,
    codec: Codec,
    residuals: Path | None,
    new_residuals: Path,
    resident: Collection[str],
    report: Callable[[str], None] = logger.warning,
) -> Compressed:
    """Encode the update at ``path``, in place, and write the residuals that it leaves to ``new_residuals``, durably.

    ``residuals``: those of the update before. A residual of a tensor that is not in this update stays if its unit is
    in ``resident``. A damaged one is dropped; ``report`` is told. Takes the memory of some blocks, or of one neuron
    table. Raises TrainingDiverged for a change that is not finite, StorageError.
    """
    header = read_header(path)
    before: dict[str, TensorEntry] = {}
    damaged: dict[str, str] = {}

    def drop(what: str, problem: str) -> None:
        report(
            f"residuals of {what} in {residuals} are damaged and dropped, what earlier updates have left out is lost: "
            f"{problem}"
        )

    try:
        before = {} if residuals is None else _undamaged(residuals, damaged)
    except InvalidUpdate as error:
        drop("every tensor", str(error))
    tensors = [
        _Tensor(name, entry) if codec.size_bytes(math.prod(entry.info.shape)) >= entry.size_bytes
        or entry.info.dtype not in FLOAT_DTYPES
        else _with_base(name, path, header, units, find_base, codec, (residuals, before), damaged)
        for name, entry in header.items()
    ]  # fmt: skip
    if damaged:
        drop(f"{len(damaged)} tensors", " ".join(next(iter(damaged.items()))))
    encoded_units = {split_update_name(tensor.name)[0] for tensor in tensors if tensor.codec}
    kept = [
        tensor
        for tensor in tensors
        if tensor.codec
        or (split_update_name(tensor.name)[1] == NEURON_INDEX and split_update_name(tensor.name)[0] in encoded_units)
    ]
    carried = [
        entry
        for name, entry in before.items()
        if (key := split_update_name(name)[0]) in resident and (key not in encoded_units or name not in header)
    ]
    whole_bytes, squares = path.stat().st_size, np.zeros(2)
    target_path = path.with_name(f"{path.name}.encoded")
    with disk_errors(path), target_path.open("wb") as target, new_residuals.open("wb") as left:
        target.write(encode_header([tensor.sent for tensor in tensors]))
        checked = _CheckedFile(left, [*(tensor.left for tensor in kept), *(entry.info for entry in carried)])
        for tensor in tensors:
            raw = map_tensor(path, tensor.entry).reshape(-1)
            if tensor.codec is not None:
                squares += _encode_tensor(tensor, tensor.codec, raw, target, checked)
                continue
            target.write(array_bytes(raw))
            if tensor in kept:
                checked.write(tensor.name, array_bytes(raw))
        for entry in carried:
            assert residuals is not None, "what is carried comes from it"
            checked.write(entry.info.name, array_bytes(map_tensor(residuals, entry)))
        checked.finish()
        sync_file(target)
    with disk_errors(path):
        os.replace(target_path, path)
    change, residual = np.sqrt(squares).tolist()
    return Compressed(codec.name if encoded_units else "none", whole_bytes, path.stat().st_size, change, residual)


def _with_base(
    name: str,
    path: Path,
    header: Mapping[str, TensorEntry],
    units: Mapping[str, UnitInfo],
    find_base: FindBase,
    codec: Codec,
    residuals: tuple[Path | None, Mapping[str, TensorEntry]],
    damaged: dict[str, str],
) -> _Tensor:
    """A tensor of the update at ``path`` with its base and its residual; not encoded if the base is gone or damaged.

    A residual that cannot be right goes to ``damaged``, {name: problem}.
    """
    key, tensor, _ = split_update_name(name)
    base_path = find_base(units[key])
    if base_path is None:
        return _Tensor(name, header[name])
    try:
        places = read_header(base_path)
    except InvalidUpdate:
        places = {}
    if tensor not in places:
        return _Tensor(name, header[name])
    base, (old_path, old), residual = map_tensor(base_path, places[tensor]), residuals, None
    if is_factor(tensor):
        base = base[tuple(map(slice, header[name].info.shape))]  # of a device of a smaller rank, the leading part
    if old_path is not None and name in old:
        if problem := _residual_problem(name, old, header[name].info):
            damaged[name] = problem
        else:
            residual = widen(map_tensor(old_path, old[name]), old[name].info.dtype)
    if residual is not None and is_factor(tensor) and residual.shape != header[name].info.shape:
        found, residual = residual, np.zeros(header[name].info.shape, dtype=np.float32)  # the rank has changed
        both = tuple(map(slice, map(min, found.shape, residual.shape)))
        residual[both] = found[both]
    if tensor == NEURON_TABLE and neuron_table(units[key]) is not None:
        index = update_name(key, NEURON_INDEX)
        rows = map_tensor(path, header[index])
        own = map_tensor(base_path, places[NEURON_INDEX]) if NEURON_INDEX in places else np.arange(len(base))
        at = np.searchsorted(own, rows)
        if at[-1] >= len(own) or (own[at] != rows).any():
            return _Tensor(name, header[name])
        base = base[at]
        if residual is not None and old_path is not None:
            _, mine, theirs = np.intersect1d(rows, map_tensor(old_path, old[index]), return_indices=True)
            found, residual = residual, np.zeros((len(rows), residual.shape[1]), dtype=np.float32)
            residual[mine] = found[theirs]
    return _Tensor(
        name, header[name], codec, base.reshape(-1), None if residual is None else residual.reshape(-1)
    )  # fmt: skip


def _residual_problem(name: str, places: Mapping[str, TensorEntry], info: TensorInfo) -> str:
    """Why the residual ``name`` cannot be that of a tensor ``info``; "" if it can."""
    found, expected, dtype = places[name].info, info.shape, _residual_dtype(info.dtype)
    key, tensor, _ = split_update_name(name)
    if tensor == NEURON_TABLE:  # it may have other rows
        index = places.get(update_name(key, NEURON_INDEX))
        if index is None or index.info.dtype != "I32":
            return "has no index"
        expected = (*index.info.shape, *info.shape[1:])
    if is_factor(tensor) and len(found.shape) == len(expected) == 2:  # it may have another rank
        expected = (found.shape[0], expected[1]) if tensor.endswith(LORA_A) else (expected[0], found.shape[1])
    if found.shape != expected or found.dtype != dtype:
        return f"is {found.dtype} of shape {list(found.shape)}, expected {dtype} of {list(expected)}"
    return ""


def _first_sum(info: TensorInfo) -> int:
    return zlib.crc32(f"{info.name} {info.dtype} {list(info.shape)}".encode())


class _CheckedFile:
    """A file of residuals: a frame of ``tensors``, which are written one after the other, and their checksums."""

    def __init__(self, file: BinaryIO, tensors: Sequence[TensorInfo]):
        self._file, self._sums = file, {info.name: _first_sum(info) for info in tensors}
        file.write(encode_header([*tensors, TensorInfo(name=CHECKSUMS, dtype="I64", shape=(len(tensors),))]))

    def write(self, name: str, data: memoryview) -> None:
        """Append bytes of a tensor."""
        self._file.write(data)
        self._sums[name] = zlib.crc32(data, self._sums[name])

    def finish(self) -> None:
        """Append the checksums; the file is durable then."""
        self._file.write(array_bytes(np.array([*self._sums.values()], dtype="<i8")))
        sync_file(self._file)


def _undamaged(path: Path, damaged: dict[str, str]) -> dict[str, TensorEntry]:
    """The tensors of a file of residuals. One without its checksum goes to ``damaged``, {name: problem}.

    Raises InvalidUpdate for a file that is no frame, or has no checksums.
    """
    found = read_header(path)
    sums = found.pop(CHECKSUMS, None)
    if sums is None or (sums.info.dtype, sums.info.shape) != ("I64", (len(found),)):
        raise InvalidUpdate("the file has no checksums")
    for (name, entry), expected in zip(found.items(), map_tensor(path, sums).tolist(), strict=True):
        if zlib.crc32(array_bytes(map_tensor(path, entry)), _first_sum(entry.info)) != expected:
            damaged[name] = "does not have its checksum"
    return {name: entry for name, entry in found.items() if name not in damaged}


def _encode_tensor(tensor: _Tensor, codec: Codec, raw: np.ndarray, target: BinaryIO, left: _CheckedFile) -> np.ndarray:
    """Write the encoded change and the new residual. Returns the squared norms of both, (2,)."""
    dtype, squares = tensor.entry.info.dtype, np.zeros(2)
    assert tensor.base is not None, "what is encoded has a base"
    for begin in range(0, len(raw), CHUNK_VALUES):
        part = slice(begin, begin + CHUNK_VALUES)
        change = (widen(raw[part], dtype) - widen(tensor.base[part], dtype)).astype(np.float32, copy=False)
        if tensor.residual is not None:
            change += tensor.residual[part]
        try:
            encoded = encode(codec, change)
        except ValueError as error:
            raise TrainingDiverged(f"{tensor.name} changed too much to be sent: {error}") from error
        target.write(array_bytes(encoded))
        squares[0] += float(change @ change)
        decoded = np.empty_like(change)
        decode(codec, encoded, decoded)
        change -= decoded
        squares[1] += float(change @ change)
        left.write(tensor.name, array_bytes(narrow(change, tensor.left.dtype)))
    return squares


def resident_keys(manifest: Manifest, trained: TrainedUpdate) -> set[str]:
    """Keys of the units on the device: the experts that it reports, and every unit that is not an expert."""
    experts = {(report.layer, report.expert) for report in trained.experts}
    return {unit.key for unit in manifest.units if unit.kind != "expert" or (unit.layer, unit.expert) in experts}


class UpdateCompressor:
    """Compresses the updates of one device in one run, and reports when the codec changes.

    ``path_of``: the cache's file of a blob, whether or not it is there.
    """

    def __init__(self, journal: Journal, path_of: Callable[[str], Path], report: Callable[[str], None]) -> None:
        self._journal, self._path_of, self._report = journal, path_of, report
        self._slices: dict[str, UnitSlice] = {}
        self._reported = ""

    def note_slices(self, items: Iterable[object]) -> None:
        """Remember which slices of units the device has."""
        self._slices |= {item.key: item for item in items if isinstance(item, UnitSlice)}

    def compress(
        self, requested: str, manifest: Manifest, trained: TrainedUpdate, path: Path, rate: float | None
    ) -> dict[str, float]:
        """Compress the update of the round at ``path`` if the run asks for it. Returns metrics of the update.

        ``requested`` is `RunConfig.compression`, ``rate`` the measured uplink in bytes per second.
        """
        with disk_errors(path):
            whole_bytes = path.stat().st_size
        codec = choose_codec(requested, whole_bytes, rate)
        if codec is None:
            return {}
        units = {unit.key: unit for unit in manifest.units}
        result = compress_update(
            *(path, units, self._find_base, codec),
            *(self._journal.residuals_path, self._journal.new_residuals_path(), resident_keys(manifest, trained)),
            self._report,
        )
        if result.codec not in ("none", self._reported):
            self._reported = result.codec
            sizes = f"{format_bytes(result.size_bytes)} instead of {format_bytes(result.whole_bytes)}"
            uplink = f", for an uplink of {rate * 8e-6:.1f} Mbit/s" if requested == "auto" and rate else ""
            self._report(f"updates are sent as {result.codec}: {sizes}{uplink}")
        return result.metrics()

    def _find_base(self, unit: UnitInfo) -> Path | None:
        own = self._slices.get(unit.key)
        names = [unit.sha256] if own is None or own.unit.sha256 != unit.sha256 else [unit.sha256, own.sha256]
        return next((path for name in names if (path := self._path_of(name)).exists()), None)
