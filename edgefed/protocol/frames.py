"""Named tensors as bytes: the safetensors layout, read and written without torch.

A frame is 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the raw
tensors. Input may be hostile: sizes, offsets, names and shapes are checked before any byte of a tensor is read. numpy
has no bfloat16, so its bits are stored as uint16 and widened here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgefed.disk import FileRange, sync_file, sync_folder
from edgefed.errors import InvalidUpdate
from edgefed.protocol.messages import TensorInfo

MAX_HEADER_BYTES = 8 * 1024 * 1024
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U8": np.dtype("u1"), "BOOL": np.dtype("u1"),
}  # fmt: skip


NAME_SEPARATOR = "|"
"""Between unit key and tensor name in an update, so neither may contain it."""


COMPRESSIONS = ("none", "int8", "int4", "int2", "topk12", "topk6", "topk3", "topk", "auto")
"""How updates are sent: whole, as changes by a codec of `edgefed.kernels.compression`, or as the uplink allows."""
ENCODED_DTYPE = "U8"
"""Dtype of an encoded tensor in an update, whose shape is its number of bytes (`edgefed.kernels.compression`)."""


def update_name(unit_key: str, tensor_name: str, codec: str = "") -> str:
    """Name of a unit's tensor in an update, whose frame has the tensors of many units.

    With a ``codec``, the tensor is the change against the unit that the round began with, encoded.
    """
    return NAME_SEPARATOR.join((unit_key, tensor_name, codec) if codec else (unit_key, tensor_name))


def split_update_name(name: str) -> tuple[str, str, str]:
    """Inverse of `update_name`: (unit key, tensor name, codec or "")."""
    key, _, rest = name.partition(NAME_SEPARATOR)
    tensor, _, codec = rest.partition(NAME_SEPARATOR)
    return key, tensor, codec


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Position of one tensor in a file; ``start`` counts from the beginning of the file."""

    info: TensorInfo
    start: int
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class FileArray:
    """A raw array that lies in files, in C order; for whoever copies it."""

    shape: tuple[int, ...]
    ranges: Sequence[FileRange]


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype for the raw bits of a safetensors dtype (BF16 -> uint16)."""
    return _STORAGE[dtype]


def tensor_size_bytes(info: TensorInfo) -> int:
    """Bytes of one tensor's data."""
    count = 1
    for dim in info.shape:
        count *= dim
    return count * ITEM_BYTES[info.dtype]


def read_header(path: Path | str, *, max_header_bytes: int = MAX_HEADER_BYTES) -> dict[str, TensorEntry]:
    """Read and check the header of a frame file.

    Raises InvalidUpdate for an incomplete or invalid frame: truncated, header too large or not JSON, unknown dtype,
    negative dimension, size that does not match the shape, overlapping or missing bytes.
    """
    path = Path(path)
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise InvalidUpdate(f"truncated tensor frame: {file_bytes} bytes, expected at least 8")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > max_header_bytes or 8 + header_bytes > file_bytes:
            raise InvalidUpdate(
                f"invalid frame header of {header_bytes} bytes: the file has {file_bytes}, limit {max_header_bytes}"
            )
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidUpdate(f"frame header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise InvalidUpdate("frame header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _check_entry(name, entry, 8 + header_bytes) for name, entry in header.items()}
    expected = 8 + header_bytes
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.size_bytes)):
        if entry.start != expected:
            raise InvalidUpdate(f"tensor {entry.info.name!r} starts at byte {entry.start}, expected {expected}")
        expected += entry.size_bytes
    if expected != file_bytes:
        raise InvalidUpdate(f"frame describes {expected} bytes, the file has {file_bytes}")
    return entries


def _check_entry(name: str, entry: object, data_start: int) -> TensorEntry:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InvalidUpdate(f"tensor {name!r} has no dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InvalidUpdate(f"tensor {name!r} has dtype {dtype!r}, expected one of {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(dim) is int and 0 <= dim < 2**40 for dim in shape):
        raise InvalidUpdate(f"tensor {name!r} has shape {str(shape)[:80]}, expected up to 8 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int and at >= 0 for at in offsets):
        raise InvalidUpdate(f"tensor {name!r} has data_offsets {str(offsets)[:80]}, expected [begin, end]")
    info = TensorInfo(name=name, dtype=dtype, shape=tuple(shape))
    size = tensor_size_bytes(info)
    if offsets[1] - offsets[0] != size:
        raise InvalidUpdate(
            f"tensor {name!r} has {size} bytes by its shape, but {offsets[1] - offsets[0]} by its offsets"
        )
    return TensorEntry(info=info, start=data_start + offsets[0], size_bytes=size)


def encode_header(tensors: Sequence[TensorInfo]) -> bytes:
    """The header of a frame with ``tensors`` in this order, with its length; padded to 8 bytes."""
    header, offset = {}, 0
    for info in tensors:
        size = tensor_size_bytes(info)
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_frame(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> tuple[str, int]:
    """Write {name: (dtype, raw array)} to ``path`` durably: temporary file, fsync, rename.

    Returns (sha256, size_bytes). The arrays have raw bits (`storage_dtype`); the order of tensors is kept.
    """
    infos = [TensorInfo(name=name, dtype=dtype, shape=array.shape) for name, (dtype, array) in tensors.items()]
    digest, size = hashlib.sha256(), 0
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for chunk in _frame_chunks(infos, [array for _, array in tensors.values()]):
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
        sync_file(file)
    os.replace(temporary, path)
    sync_folder(path.parent)
    return digest.hexdigest(), size


def _frame_chunks(infos: Sequence[TensorInfo], arrays: Sequence[np.ndarray]) -> Iterator[bytes | memoryview]:
    yield encode_header(infos)
    for info, array in zip(infos, arrays, strict=True):
        if array.dtype != storage_dtype(info.dtype):
            raise ValueError(
                f"tensor {info.name!r} is {array.dtype}, {info.dtype} is stored as {storage_dtype(info.dtype)}"
            )
        if array.size:
            yield array_bytes(array)


def array_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order, without a copy if it is contiguous."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).data).cast("B")


def map_tensor(path: Path | str, entry: TensorEntry) -> np.ndarray:
    """Raw bits of one tensor, memory-mapped read-only; pages are read on use."""
    dtype = storage_dtype(entry.info.dtype)
    if entry.size_bytes == 0:
        return np.empty(entry.info.shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=entry.start, shape=entry.info.shape)


def widen(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits of a float dtype as float32 (F64 stays float64). Copies unless already float32 or float64."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return raw.astype(np.float32)
    if dtype in ("F32", "F64"):
        return raw
    raise ValueError(f"{dtype} is not a float type")


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """Inverse of `widen` with round-to-nearest-even: float values as raw bits of ``dtype``."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(nan, np.uint16(0x7FC0), rounded)
    if dtype in FLOAT_DTYPES:
        return values.astype(storage_dtype(dtype))
    raise ValueError(f"{dtype} is not a float type")
