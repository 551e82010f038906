"""Changed blobs on the way down: what differs from a version that the device has, without loss.

A unit that few clients trained, or whose changes came as the largest few of all, differs in few places from the version
of the round before. And where the server lets the model move in whole steps alone (`to_steps`), a few bits say how far
each value went:

    GET {BLOB}?base=SHA256     whole as ever, or of `CHANGE_TYPE` where that is less than half:

        u32 size | steps, deflated | u32 size | bitmap, deflated: a bit for each 2 bytes of the blob | 2-byte items

The float tensors are taken in blocks of 256 values, the last one filled up with zeros. The steps are an int8 exponent e
for each block, then 256 int8 codes q for each whose e is not `_STILL`: a value x moves to x + q 2^e, rounded to its
dtype. The items then replace what still differs. So two rounds, whose steps add up to steps, are a change as well.

The device applies it to the version that it has, and compares the hash of the result as after any download.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from edgefed.errors import InvalidUpdate, MalformedMessage
from edgefed.protocol.frames import FLOAT_DTYPES, narrow, read_header, storage_dtype, widen

CHANGE_TYPE = "application/vnd.edgefed.change"
MAX_BLOB_BYTES = 64 * 1024 * 1024
"""Larger blobs are sent whole: a change is made, and applied, in memory."""
STEP_BLOCK = 256
"""Values that have one size of steps."""
_ITEM = 2
_LEVEL = 6
_STILL = -128
_CHUNK_VALUES = 1 << 18
"""Values whose steps are found at a time; a multiple of `STEP_BLOCK`."""


@dataclasses.dataclass(frozen=True)
class StepLimits:
    """What of its step the model makes in a round; the rest is for later (`edgefed.aggregator.server_optimizer`).

    ``share``: that of a tensor's values that move, those with the longest steps. ``levels``: the longest step of a
    block, in multiples of 2^e (`to_steps`); 0: steps have any length.
    """

    share: float = 1.0
    levels: int = 0

    @property
    def whole(self) -> bool:
        """Whether nothing is left for later."""
        return self.share == 1 and not self.levels


DOWNLOADS: Mapping[str, StepLimits] = MappingProxyType(
    {
        "none": StepLimits(),
        "int8": StepLimits(levels=127),
        "int4": StepLimits(levels=7),
        "int3": StepLimits(levels=3),
        "topk12": StepLimits(share=1 / 8),
        "topk6": StepLimits(share=1 / 16),
        "topk3": StepLimits(share=1 / 32),
        "topk": StepLimits(share=1 / 64),
    }
)
"""Settings of ``download_compression``."""


def to_steps(values: np.ndarray, levels: int) -> np.ndarray:
    """The nearest q 2^e of ``values`` (n,) float64, |q| <= ``levels``, with the least e that each block allows."""
    blocks = _in_blocks(values)
    exponents = np.minimum(np.frexp(np.abs(blocks).max(axis=1, initial=0.0) / (levels + 0.5))[1], 1000)
    size = np.ldexp(1.0, exponents)[:, None]
    steps: np.ndarray = np.rint(blocks / size) * size
    return steps.reshape(-1)[: len(values)]


def encode_blob_change(base: Path, blob: Path) -> bytes | None:
    """What makes ``blob`` of ``base``; None if the two are of other sizes, too large, or differ in too much."""
    size_bytes = blob.stat().st_size
    if base.stat().st_size != size_bytes or size_bytes > MAX_BLOB_BYTES or size_bytes % _ITEM:
        return None
    moved, after = bytearray(base.read_bytes()), blob.read_bytes()
    parts = _float_parts(blob)
    found = [_steps_between(moved, after, *part) for part in parts] if parts == _float_parts(base) else []
    differs = np.frombuffer(moved, "<u2") != np.frombuffer(after, "<u2")
    if np.count_nonzero(differs) * _ITEM * 2 >= size_bytes:
        return None
    steps = b"".join(array.tobytes() for arrays in zip(*found, strict=True) for array in arrays)
    bitmap = np.packbits(differs, bitorder="little").tobytes()
    change = b"".join((_deflated(steps, zlib.Z_RLE), _deflated(bitmap), np.frombuffer(after, "<u2")[differs].tobytes()))
    return change if 2 * len(change) < size_bytes else None


def steps_bytes(change: bytes) -> int:
    """Bytes of a change that are of steps, and so as many for weights of any dtype."""
    return int.from_bytes(change[:4], "little")


def apply_blob_change(base: Path, change: bytes) -> bytes:
    """The blob that ``change`` makes of ``base``. Raises MalformedMessage; never makes more bytes than ``base`` has."""
    moved, parts = bytearray(base.read_bytes()), _float_parts(base)
    blocks = [math.ceil(count / STEP_BLOCK) for _, count, _ in parts]
    steps, change = _inflated(change, sum(blocks) * (1 + STEP_BLOCK), "steps")
    if steps:
        exponents = np.frombuffer(steps, np.int8, count=min(sum(blocks), len(steps)))
        codes = np.frombuffer(steps, np.int8, offset=len(exponents))
        if len(exponents) != sum(blocks) or len(codes) != np.count_nonzero(exponents != _STILL) * STEP_BLOCK:
            raise MalformedMessage(f"the {len(steps)} bytes of a change's steps are not those of {sum(blocks)} blocks")
        codes = codes.reshape(-1, STEP_BLOCK)
        for (start, count, dtype), size in zip(parts, blocks, strict=True):
            own, exponents = exponents[:size], exponents[size:]
            mine = np.count_nonzero(own != _STILL)
            raw = np.frombuffer(moved, storage_dtype(dtype), count, start)
            raw[:] = _stepped(raw, dtype, own, codes[:mine])
            codes = codes[mine:]
    wanted = -(-len(moved) // (8 * _ITEM))
    bitmap, items = _inflated(change, wanted, "bitmap")
    if len(bitmap) != wanted:
        raise MalformedMessage(f"the bitmap of a change has not the {wanted} bytes that the blob needs")
    values = np.frombuffer(moved, "<u2", count=len(moved) // _ITEM)
    differs = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little", count=len(values)).astype(bool)
    if len(items) != _ITEM * np.count_nonzero(differs):
        raise MalformedMessage(
            f"a change of a blob has {len(items)} bytes of values, its bitmap names {_ITEM * np.count_nonzero(differs)}"
        )
    values[differs] = np.frombuffer(items, "<u2")
    return bytes(moved)


def _deflated(raw: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    """``raw`` deflated, after its size."""
    deflate = zlib.compressobj(_LEVEL, strategy=strategy)
    packed = deflate.compress(raw) + deflate.flush() if raw else b""
    return len(packed).to_bytes(4, "little") + packed


def _inflated(change: bytes, most: int, what: str) -> tuple[bytes, bytes]:
    """Inverse of `_deflated`, with what follows; never more than one byte above ``most``."""
    end = 4 + int.from_bytes(change[:4], "little")
    try:
        return zlib.decompressobj().decompress(change[4:end], most + 1), change[end:]
    except zlib.error as error:
        raise MalformedMessage(f"the {what} of a blob's change cannot be read: {error}") from error


def _float_parts(path: Path) -> list[tuple[int, int, str]]:
    """(start in bytes, values, dtype) of the float tensors of a frame, large ones in parts; none if it is no frame."""
    try:
        header = read_header(path)
    except InvalidUpdate:
        return []
    return [
        (entry.start + begin * entry.size_bytes // count, min(_CHUNK_VALUES, count - begin), entry.info.dtype)
        for entry in sorted(header.values(), key=lambda entry: entry.start)
        if entry.info.dtype in FLOAT_DTYPES and (count := math.prod(entry.info.shape))
        for begin in range(0, count, _CHUNK_VALUES)
    ]


def _steps_between(moved: bytearray, after: bytes, start: int, count: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Exponents (b,) and codes (c, B) of the steps in a part of a blob, int8; ``moved`` makes them.

    A block goes in steps if that is right for most of its values.
    """
    raw = np.frombuffer(moved, storage_dtype(dtype), count, start)
    new = np.frombuffer(after, storage_dtype(dtype), count, start)
    with np.errstate(over="ignore", invalid="ignore"):
        change = _in_blocks(widen(new, dtype) - widen(raw, dtype))
        largest = np.abs(change).max(axis=1)
        # A sum is rounded, so that steps differ a bit from multiples of 2^e; 64 of them may look like less.
        exponents = np.frexp(largest * (1 + 2**-10))[1] - 7
        steady = (largest > 0) & (largest < np.inf) & (exponents > -120)
        exponents = np.where(steady, exponents, _STILL).astype(np.int8)
        codes = np.rint(change[steady] * _powers(-exponents[steady].astype(np.int32), change)).astype(np.int8)
    stepped = _stepped(raw, dtype, exponents, codes)
    right = _in_blocks(stepped == new)[steady].mean(axis=1) > 0.75
    exponents[np.flatnonzero(steady)[~right]] = _STILL
    raw[:] = np.where(np.repeat(exponents != _STILL, STEP_BLOCK)[:count], stepped, raw)
    return exponents, codes[right]


def _stepped(raw: np.ndarray, dtype: str, exponents: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The values ``raw`` (n,) after their steps; blocks that have none keep their bits."""
    blocks, coded = _in_blocks(raw), exponents != _STILL
    with np.errstate(over="ignore", invalid="ignore"):
        values = widen(blocks[coded], dtype)
        blocks[coded] = narrow(values + codes * _powers(exponents[coded], values), dtype)
    return blocks.reshape(-1)[: len(raw)]


def _powers(exponents: np.ndarray, like: np.ndarray) -> np.ndarray:
    """2^e as (b, 1), of the dtype of ``like``."""
    return np.ldexp(np.ones((len(exponents), 1), like.dtype), exponents.astype(np.int32)[:, None])


def _in_blocks(values: np.ndarray) -> np.ndarray:
    """A copy of ``values`` (n,) as (b, `STEP_BLOCK`), filled up with zeros."""
    blocks = np.zeros((math.ceil(len(values) / STEP_BLOCK), STEP_BLOCK), dtype=values.dtype)
    blocks.reshape(-1)[: len(values)] = values
    return blocks
