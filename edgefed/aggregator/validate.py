"""Checks of everything that a client sends: ids, registrations, updates. After them the server trusts its input.

An update is a frame with tensors named ``<unit key>|<tensor name>``, in whole units, with the manifest's dtypes and
shapes and finite values, and an `UpdateMeta` whose numbers are in range. A tensor ``<unit key>|<tensor name>|<codec>``
is an encoded change, of as many bytes as the manifest's shape needs, with scales and indices in range. Of a neuron
table it may have some rows
(`edgefed.aggregator.slices`). The file is not loaded but scanned through one small buffer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgefed import __version__
from edgefed.aggregator.slices import check_slice, upload_tensors
from edgefed.disk import disk_errors
from edgefed.errors import InvalidUpdate, MalformedMessage, VersionMismatch
from edgefed.kernels.compression import CODECS, Codec, problem_of
from edgefed.kernels.fold import FoldBackend
from edgefed.protocol import PROTOCOL_VERSION
from edgefed.protocol.frames import (
    ENCODED_DTYPE,
    FLOAT_DTYPES,
    MAX_HEADER_BYTES,
    NAME_SEPARATOR,
    TensorEntry,
    encode_header,
    read_header,
    split_update_name,
    storage_dtype,
    update_name,
)
from edgefed.protocol.messages import (
    NEURON_INDEX,
    NEURON_TABLE,
    DeviceInfo,
    ExpertSurvey,
    Register,
    TensorInfo,
    UnitInfo,
    UpdateMeta,
)
from edgefed.protocol.slices import INDEX_DTYPE, neuron_table

CLIENT_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
MIN_KEY_CHARACTERS = 16
MAX_TEXT_CHARACTERS = 256
MAX_NUMBER = 10**9 - 1
MAX_SIZE_BYTES = 2**53
"""More than any memory, and still exact in every JSON reader."""
SCAN_BLOCK_BYTES = 256 * 1024
MAX_EXAMPLES = 10**9
MAX_COUNT = 10**15
"""Limit of tokens and steps: far beyond any round, and exact in float64."""
MAX_METRIC = 1e15
"""Limit of a metric, so that sums over clients stay finite."""
MIN_FREQUENCY = 1e-15
"""Smallest frequency other than 0: one token of `MAX_COUNT`."""
LIMIT_SLACK = 1e-6
"""How far rounding may take a claim beyond the range of its equation."""
MAX_METRICS = 256
MAX_METRIC_NAME = 64
_HEADER_SLACK_BYTES = 64 * 1024


# --- clients and registrations ----------------------------------------------------------------------------------


def check_client_id(client_id: str) -> None:
    """Raise MalformedMessage unless the id may be part of a file name."""
    if CLIENT_ID.fullmatch(client_id) is None:
        raise MalformedMessage(f"invalid client id {client_id[:80]!r}: expected 1 to 64 letters, digits, _ or -")


def parse_number(text: str, what: str, most: int = MAX_NUMBER) -> int:
    """Parse a number of a URL. Raises MalformedMessage unless it is plain digits, at most ``most``."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and int(text) <= most):
        raise MalformedMessage(f"{what} is {text[:40]!r}, expected a number from 0 to {most}")
    return int(text)


def digest_bytes(text: str) -> bytes:
    """SHA-256 of a text, which may contain any character of a header."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def digest(text: str) -> str:
    """SHA-256 of a text in hexadecimal. The server stores only this of a client's key."""
    return digest_bytes(text).hex()


def is_text(text: str, most: int = MAX_TEXT_CHARACTERS) -> bool:
    """Whether a text may go to a log or a terminal: short, without control characters."""
    return len(text) <= most and text.isprintable()


def check_register(message: Register) -> None:
    """Check a registration by itself. Raises VersionMismatch, MalformedMessage."""
    if message.protocol_version != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"the client speaks protocol {message.protocol_version} (edgefed {message.edgefed_version[:32]!r}), "
            f"this server {PROTOCOL_VERSION} (edgefed {__version__})"
        )
    check_client_id(message.client_id)
    wrong = [
        text
        for fine, text in (
            (
                len(message.client_key) >= MIN_KEY_CHARACTERS,
                f"client_key has fewer than {MIN_KEY_CHARACTERS} characters",
            ),
            (is_text(message.client_key), "client_key is too long or not printable"),
            (is_text(message.name), f"name {message.name[:80]!r} is too long or not printable"),
            (is_size(message.memory_bytes), f"memory_bytes is {message.memory_bytes}"),
            (0.0 <= message.expert_share <= 1.0, f"expert_share is {message.expert_share}, expected 0..1"),
            (
                0.0 < message.compute_share <= 1.0,
                f"compute_share is {message.compute_share}, expected above 0, up to 1",
            ),
            (0 <= message.num_examples <= 10**9, f"num_examples is {message.num_examples}"),
        )
        if not fine
    ]
    if message.device is not None:
        wrong += _device_errors(message.device)
    if wrong:
        raise MalformedMessage("; ".join(wrong))


def is_size(size_bytes: int) -> bool:
    """Whether a number is a possible memory size."""
    return 0 <= size_bytes <= MAX_SIZE_BYTES


def _device_errors(device: DeviceInfo) -> list[str]:
    values = msgspec.structs.asdict(device)
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    sizes = {name: value for name, value in values.items() if isinstance(value, int)}
    errors = [f"device.{name} is too long or not printable" for name, text in texts.items() if not is_text(text)]
    errors += [f"device.{name} is {size}" for name, size in sizes.items() if not is_size(size)]
    return errors


# --- updates ----------------------------------------------------------------------------------------------------


def max_header_bytes(units: Sequence[UnitInfo]) -> int:
    """Largest header of an update of these units: twice the compact one, because a writer may add spaces."""
    infos = [
        TensorInfo(name=update_name(unit.key, info.name), dtype=info.dtype, shape=info.shape)
        for unit in units
        if unit.trainable
        for info in upload_tensors(unit)
    ]
    return min(2 * len(encode_header(infos)) + _HEADER_SLACK_BYTES, MAX_HEADER_BYTES)


def max_update_bytes(units: Sequence[UnitInfo]) -> int:
    """Largest size of an update: every trainable tensor at 4 bytes a value (8 for F64), and the header."""
    total = max_header_bytes(units)
    for unit in units:
        if unit.trainable:
            total += sum(math.prod(info.shape) * (8 if info.dtype == "F64" else 4) for info in upload_tensors(unit))
    return total


@dataclasses.dataclass(frozen=True)
class ClaimLimits:
    """The most that an update may claim of itself.

    ``tokens``: those of a round of local training. ``importance``: the upper end of the method's range
    (`methods.interface.ExpertMethod.importance_limit`).
    """

    tokens: int = MAX_COUNT
    importance: float = 1.0


WIDEST = ClaimLimits()


def validate_meta(meta: UpdateMeta, experts_per_layer: Sequence[int], limits: ClaimLimits = WIDEST) -> None:
    """Check the numbers of an update. Raises InvalidUpdate."""
    if not 1 <= meta.num_examples <= MAX_EXAMPLES:
        raise InvalidUpdate(f"num_examples is {meta.num_examples}, expected 1..{MAX_EXAMPLES}")
    if not 0 <= meta.num_tokens <= limits.tokens:
        raise InvalidUpdate(f"num_tokens is {meta.num_tokens}, expected 0..{limits.tokens}")
    if len(meta.metrics) > MAX_METRICS:
        raise InvalidUpdate(f"the update has {len(meta.metrics)} metrics, expected at most {MAX_METRICS}")
    for name, value in meta.metrics.items():
        if not abs(value) <= MAX_METRIC or not 0 < len(name) <= MAX_METRIC_NAME or not name.isprintable():
            raise InvalidUpdate(
                f"metric {name[:MAX_METRIC_NAME]!r} is {value}, expected a short name and a number of at most "
                f"{MAX_METRIC:g}"
            )
    seen = set()
    for report in meta.experts:
        where = f"report for expert {report.expert} of layer {report.layer}"
        if not 0 <= report.layer < len(experts_per_layer) or not 0 <= report.expert < experts_per_layer[report.layer]:
            raise InvalidUpdate(f"{where}: the model has no such expert")
        if (report.layer, report.expert) in seen:
            raise InvalidUpdate(f"duplicate {where}")
        seen.add((report.layer, report.expert))
        if not 0.0 <= report.usage <= 1.0:
            raise InvalidUpdate(f"{where}: usage is {report.usage}, expected 0..1")
        if not 0.0 <= report.importance <= limits.importance + LIMIT_SLACK:
            raise InvalidUpdate(f"{where}: importance is {report.importance}, expected 0..{limits.importance:g}")
        for field, value, most in (("steps", report.steps, MAX_COUNT), ("tokens", report.tokens, limits.tokens)):
            if not 0 <= value <= most:
                raise InvalidUpdate(f"{where}: {field} is {value}, expected 0..{most}")
    if meta.survey is not None:
        _check_survey(meta.survey, experts_per_layer)


def _check_survey(survey: ExpertSurvey, experts_per_layer: Sequence[int]) -> None:
    sizes = list(experts_per_layer)
    for name, rows in (("utility", survey.utility), ("frequency", survey.frequency)):
        found = [len(row) for row in rows]
        if found != sizes:
            raise InvalidUpdate(f"survey: {name} has rows of {found[:8]} numbers, the layers have {sizes[:8]} experts")
        for row in rows:
            for value in row:
                if value is not None and not 0.0 <= value <= MAX_METRIC:
                    raise InvalidUpdate(f"survey: {name} has the value {value}, expected 0..{MAX_METRIC:g}")
    if any(value > 1.0 or 0.0 < value < MIN_FREQUENCY for row in survey.frequency for value in row):
        raise InvalidUpdate(f"survey: a frequency is above 1, or between 0 and {MIN_FREQUENCY:g}")
    if not len(sizes) <= survey.tune_slots <= sum(sizes):
        raise InvalidUpdate(f"survey: tune_slots is {survey.tune_slots}, expected {len(sizes)}..{sum(sizes)}")
    if survey.train_slots is not None and not 1 <= survey.train_slots <= sum(sizes):
        raise InvalidUpdate(f"survey: train_slots is {survey.train_slots}, expected 1..{sum(sizes)}")
    for name in ("upload_bytes_per_s", "download_bytes_per_s"):
        rate = getattr(survey, name)
        if rate is not None and not 1.0 <= rate <= MAX_COUNT:  # NaN fails, too
            raise InvalidUpdate(f"survey: {name} is {rate}, expected 1..{MAX_COUNT}")


def validate_update(
    path: Path,
    meta: UpdateMeta,
    units: Sequence[UnitInfo],
    experts_per_layer: Sequence[int],
    backend: FoldBackend,
    limits: ClaimLimits = WIDEST,
) -> frozenset[str]:
    """Check an uploaded frame and its meta against the manifest's units. Returns the keys of the units in it.

    Raises InvalidUpdate, which names the tensor, what was expected and what was found.
    """
    validate_meta(meta, experts_per_layer, limits)
    entries = read_header(path, max_header_bytes=max_header_bytes(units))
    uploaded = _check_tensors(path, entries, {unit.key: unit for unit in units})
    reported = {(report.layer, report.expert) for report in meta.experts}
    for unit in units:
        if unit.key in uploaded and unit.kind == "expert" and (unit.layer, unit.expert) not in reported:
            raise InvalidUpdate(f"{unit.key!r} was uploaded without a report for that expert")
    _check_finite(path, entries, {unit.key: unit for unit in units}, backend)
    return uploaded


def update_units(path: Path) -> frozenset[str]:
    """Keys of the units in a validated update."""
    return frozenset(name.partition(NAME_SEPARATOR)[0] for name in read_header(path))


def _check_tensors(path: Path, entries: Mapping[str, TensorEntry], units: Mapping[str, UnitInfo]) -> frozenset[str]:
    found: dict[str, dict[str, TensorEntry]] = {}
    for full_name, entry in entries.items():
        key, name, codec = split_update_name(full_name)
        unit = units.get(key)
        if unit is None:
            raise InvalidUpdate(f"tensor {full_name[:200]!r} belongs to no part of the model")
        if not unit.trainable:
            raise InvalidUpdate(f"tensor {full_name!r} is not trained in this run")
        expected = next((info for info in upload_tensors(unit) if info.name == name), None)
        if expected is None:
            raise InvalidUpdate(f"{key!r} has no tensor {name[:200]!r}")
        if name in found.get(key, ()):
            raise InvalidUpdate(f"tensor {full_name!r} is there twice")
        if codec:
            _check_encoded(full_name, codec, entry, expected, unit, entries)
            found.setdefault(key, {})[name] = entry
            continue
        if entry.info.dtype != expected.dtype:
            raise InvalidUpdate(f"tensor {full_name!r} is {entry.info.dtype}, the manifest says {expected.dtype}")
        in_slice = name in (NEURON_TABLE, NEURON_INDEX) and neuron_table(unit) is not None
        if entry.info.shape != tuple(expected.shape) and not in_slice:
            raise InvalidUpdate(
                f"tensor {full_name!r} has shape {list(entry.info.shape)}, the manifest says {list(expected.shape)}"
            )
        found.setdefault(key, {})[name] = entry
    for key, tensors in found.items():
        missing = [info.name for info in upload_tensors(units[key]) if info.name not in tensors]
        if missing:
            raise InvalidUpdate(f"{key!r} is incomplete: tensors {json.dumps(missing)} are missing")
        if neuron_table(units[key]) is not None:
            check_slice(path, units[key], tensors)
    return frozenset(found)


def _check_encoded(
    name: str, codec: str, entry: TensorEntry, expected: TensorInfo, unit: UnitInfo, entries: Mapping[str, TensorEntry]
) -> None:
    """Check codec and length of an encoded tensor, before a byte of it is read."""
    if codec not in CODECS:
        raise InvalidUpdate(f"tensor {name[:200]!r}: unknown codec {codec[:40]!r}, expected one of {', '.join(CODECS)}")
    if expected.dtype not in FLOAT_DTYPES:
        raise InvalidUpdate(f"tensor {name!r} is encoded, but {expected.dtype} is not a float type")
    size = CODECS[codec].size_bytes(_num_sent(unit, expected, entries))
    if entry.info.dtype != ENCODED_DTYPE or entry.info.shape != (size,):
        raise InvalidUpdate(
            f"tensor {name!r} is {entry.info.dtype} of shape {list(entry.info.shape)}, expected {ENCODED_DTYPE} of "
            f"[{size}]"
        )


def _num_sent(unit: UnitInfo, expected: TensorInfo, entries: Mapping[str, TensorEntry]) -> int:
    """Values of a tensor in an update: of a neuron table, those of the rows that its index names."""
    shape = expected.shape
    if expected.name == NEURON_TABLE and neuron_table(unit) is not None:
        index = entries.get(update_name(unit.key, NEURON_INDEX))
        width = index.info.shape[0] if index is not None and len(index.info.shape) == 1 else 0
        shape = (min(width, shape[0]), *shape[1:])
    return math.prod(shape)


def _check_finite(
    path: Path, entries: Mapping[str, TensorEntry], units: Mapping[str, UnitInfo], backend: FoldBackend
) -> None:
    buffer = np.empty(SCAN_BLOCK_BYTES, dtype=np.uint8)
    with disk_errors(f"read {path}"), path.open("rb", buffering=0) as file:
        for name, entry in entries.items():
            if entry.info.dtype == INDEX_DTYPE:
                continue  # no other trainable tensor is of integers
            dtype, done = storage_dtype(entry.info.dtype), 0
            file.seek(entry.start)
            key, tensor, codec = split_update_name(name)
            if codec:
                count = _num_sent(units[key], next(t for t in units[key].tensors if t.name == tensor), entries)
                _check_blocks(file, name, CODECS[codec], count, buffer)
                continue
            while done < entry.size_bytes:
                block = buffer[: min(SCAN_BLOCK_BYTES, entry.size_bytes - done)]
                read_exactly(file, block)
                bad = backend.first_nonfinite(block.view(dtype), entry.info.dtype)
                if bad >= 0:
                    raise InvalidUpdate(f"tensor {name!r}: element {done // dtype.itemsize + bad} is not finite")
                done += block.nbytes


def _check_blocks(file: io.FileIO, name: str, codec: Codec, count: int, buffer: np.ndarray) -> None:
    """Check scales and indices of an encoded tensor of ``count`` values, from the position of ``file`` on."""
    step = SCAN_BLOCK_BYTES // codec.block_bytes(codec.block) * codec.block
    step = min(step, SCAN_BLOCK_BYTES // 4 // codec.block * codec.block)
    for begin in range(0, count, step):
        length = min(step, count - begin)
        raw = buffer[: codec.size_bytes(length)]
        read_exactly(file, raw)
        if problem := problem_of(codec, raw, length):
            raise InvalidUpdate(f"tensor {name!r}, values from {begin} on: {problem}")


def read_exactly(file: io.FileIO, buffer: np.ndarray) -> None:
    """Fill ``buffer`` (uint8) from the file's position. Raises OSError if the file is too short."""
    view = memoryview(buffer.data).cast("B")
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError("the file ends too early")
        view = view[count:]
