"""Lossy codecs of changes: blocks of float32 values as few bits, each block on its own.

A trained tensor is sent as its change v against the global one. The values are taken in C order in blocks of B; the
last block may be shorter. An encoded block begins with its scales, so any block of a tensor is read without the others:

    int8, int4   B = 256      s | codes          v ~ s q,  s = max |v| / L,  q = round(v / s),  L = 127 or 7
    int2         B = 1024     low, high | codes  v ~ +-low or +-high: a sign bit and a magnitude bit
    topk12, ...  B = 4096     low, high | codes | indices   as int2, of the k largest |v| alone; the rest is 0

Scales are little-endian float32 from 0 to `MAX_SCALE`. Codes are packed from the lowest bit on. The k indices of a
block of m values are sorted and written by Elias and Fano: with l = floor(log2(m / k)), the l low bits of each, then a
bitmap in which bit i + (index_i >> l) is set for the i-th. That takes 5 to 8 bits an index, and always the same
number of bytes. The idea of sparse 2-bit updates with error feedback is that of SparseLoCo (arXiv 2508.15706); its
indices have 12 bits, and its blocks have one scale.

Decoding is the product of a scale and a small integer, or a scale with a sign: exact in float32 up to one rounding, so
every backend gives the same bits. The native library (csrc/compression.cpp) is used where it is built; the numpy
functions are the specification. Needs no torch.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from edgefed.native import ABI_VERSION, NativeUnavailable, find_native, load_library

logger = logging.getLogger(__name__)

MAX_SCALE = 1e30
"""Largest scale: a decoded value stays finite."""
_SMALLEST = np.float32(1e-30)
"""Smaller values are 0: their reciprocal would not be finite."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """Layout of a codec. ``bits`` of a value's code; ``top``: values of a whole block that are sent, 0 for all."""

    name: str
    block: int
    bits: int
    top: int = 0

    @property
    def num_scales(self) -> int:
        """Scales of a block."""
        return 2 if self.bits == 2 else 1

    def num_sent(self, count: int) -> int:
        """Values that are sent of a block of ``count``."""
        return -(-count * self.top // self.block) if self.top else count

    def low_bits(self, count: int) -> int:
        """Bits of an index that are written as they are, in a block of ``count`` values."""
        return int(math.log2(count / self.num_sent(count)))

    def parts(self, count: int) -> tuple[int, int, int, int]:
        """Bytes of the scales, the codes, the low bits and the bitmap of a block of ``count`` values."""
        sent = self.num_sent(count)
        low = high = 0
        if self.top:
            low = -(-sent * self.low_bits(count) // 8)
            high = -(-(sent + ((count - 1) >> self.low_bits(count))) // 8)
        return 4 * self.num_scales, -(-sent * self.bits // 8), low, high

    def block_bytes(self, count: int) -> int:
        """Bytes of a block of ``count`` values."""
        return sum(self.parts(count))

    def size_bytes(self, count: int) -> int:
        """Bytes of ``count`` values."""
        whole, rest = divmod(count, self.block)
        return whole * self.block_bytes(self.block) + (self.block_bytes(rest) if rest else 0)


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        codec.name: codec
        for codec in (
            Codec("int8", 256, 8),
            Codec("int4", 256, 4),
            Codec("int2", 1024, 2),
            Codec("topk12", 4096, 2, top=512),
            Codec("topk6", 4096, 2, top=240),
            Codec("topk3", 4096, 2, top=128),
            Codec("topk", 4096, 2, top=64),
        )
    }
)
"""Codecs by name, from the most bytes to the fewest."""
LARGEST_BLOCK = max(codec.block for codec in CODECS.values())


def _in_blocks(
    codec: Codec, values: np.ndarray, raw: np.ndarray, do: Callable[[np.ndarray, np.ndarray], object]
) -> None:
    """Call ``do`` with the whole blocks, (r, B) values and (r, bytes), and with the short last one."""
    whole = len(values) // codec.block
    split, size = whole * codec.block, codec.block_bytes(codec.block)
    if whole:
        do(values[:split].reshape(whole, codec.block), raw[: whole * size].reshape(whole, size))
    if split < len(values):
        do(values[split:].reshape(1, -1), raw[whole * size :].reshape(1, -1))


class _NativeCodec(ctypes.Structure):
    """struct EfCodec of csrc/edgefed.h."""

    _fields_ = [("block", ctypes.c_int32), ("bits", ctypes.c_int32), ("top", ctypes.c_int32)]


_P, _L = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS: dict[str, list[Any]] = {
    "ef_encode_change": [_L, _P, _P, _L, _P],
    "ef_decode_change": [None, _P, _P, _L, _P],
    "ef_check_change": [_L, _P, _P, _L],
}


@functools.lru_cache(maxsize=1)
def native_library() -> ctypes.CDLL | None:
    """The native library; None, and a line in the log, without it."""
    try:
        return load_library(find_native(), "ef_abi_version", ABI_VERSION, _FUNCTIONS)
    except NativeUnavailable as error:
        logger.info("changes are encoded with numpy: %s", error)
        return None


@functools.lru_cache(maxsize=16)
def _native_codec(codec: Codec) -> _NativeCodec:
    return _NativeCodec(codec.block, codec.bits, codec.top)


def encode(codec: Codec, values: np.ndarray) -> np.ndarray:
    """Encode ``values`` (n,) float32 as (codec.size_bytes(n),) uint8. Raises ValueError for values beyond MAX_SCALE."""
    library = native_library()
    if library is None:
        return encode_reference(codec, values)
    values = np.ascontiguousarray(values, dtype=np.float32)
    raw = np.empty(codec.size_bytes(len(values)), dtype=np.uint8)
    codec_ref = ctypes.byref(_native_codec(codec))
    if library.ef_encode_change(codec_ref, values.ctypes.data, len(values), raw.ctypes.data):
        raise ValueError(f"the values must be finite and at most {MAX_SCALE:g}")
    return raw


def decode(codec: Codec, raw: np.ndarray, out: np.ndarray) -> None:
    """Decode ``raw`` uint8 into ``out`` (n,) float32, contiguous. The bytes must be valid (`problem_of`)."""
    if len(raw) != codec.size_bytes(len(out)) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"{len(raw)} bytes are not {len(out)} values of {codec.name}, or these are not float32")
    library = native_library()
    if library is None:
        decode_reference(codec, raw, out)
        return
    raw = np.ascontiguousarray(raw)
    library.ef_decode_change(ctypes.byref(_native_codec(codec)), raw.ctypes.data, len(out), out.ctypes.data)


def problem_of(codec: Codec, raw: np.ndarray, count: int) -> str:
    """What is wrong with ``raw``, the bytes of ``count`` values; "" if nothing is."""
    if len(raw) != codec.size_bytes(count):
        return f"it has {len(raw)} bytes, {count} values have {codec.size_bytes(count)}"
    library, whole = native_library(), np.ascontiguousarray(raw)
    if library is not None and not library.ef_check_change(
        ctypes.byref(_native_codec(codec)), whole.ctypes.data, count
    ):
        return ""
    problems: list[str] = []
    places = np.empty(count, dtype=np.float32)  # only its shape is used
    _in_blocks(codec, places, raw, lambda part, source: problems.append(_problem(codec, part, source)))
    return next(filter(None, problems), "")


# --- the specification ------------------------------------------------------------------------------------------


def encode_reference(codec: Codec, values: np.ndarray) -> np.ndarray:
    """As `encode`."""
    if not (np.abs(values) <= MAX_SCALE).all():  # NaN fails, too
        raise ValueError(f"the values must be finite and at most {MAX_SCALE:g}")
    raw = np.zeros(codec.size_bytes(len(values)), dtype=np.uint8)
    rows = _encode_indexed if codec.top else _encode_levels if codec.bits == 2 else _encode_uniform
    _in_blocks(codec, values, raw, lambda part, target: rows(codec, part, target))
    return raw


def decode_reference(codec: Codec, raw: np.ndarray, out: np.ndarray) -> None:
    """As `decode`."""
    rows = _decode_indexed if codec.top else _decode_levels if codec.bits == 2 else _decode_uniform
    _in_blocks(codec, out, raw, lambda part, source: rows(codec, part, source))


def _problem(codec: Codec, out: np.ndarray, raw: np.ndarray) -> str:
    scales = _scales(codec, raw)
    bad = np.argwhere(~((scales >= 0) & (scales <= MAX_SCALE)))
    if len(bad):
        return f"scale of block {bad[0, 0]} is {scales[tuple(bad[0])]}, expected 0..{MAX_SCALE:g}"
    if codec.top:
        sent = codec.num_sent(out.shape[1])
        bits = _bitmap(codec, out.shape[1], raw)
        wrong = np.flatnonzero(bits.sum(axis=1, dtype=np.int64) != sent)
        if len(wrong):
            return f"block {wrong[0]} has {int(bits[wrong[0]].sum())} indices, expected {sent}"
        indices = _indices(codec, out.shape[1], raw, bits)
        wrong = np.flatnonzero((indices[:, -1] >= out.shape[1]) | (np.diff(indices, axis=1) <= 0).any(axis=1))
        if len(wrong):
            return f"the indices of block {wrong[0]} must ascend and be below {out.shape[1]}"
    return ""


# --- uniform codes ----------------------------------------------------------------------------------------------


def _scales(codec: Codec, raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw[:, : 4 * codec.num_scales]).view("<f4")


def _encode_uniform(codec: Codec, values: np.ndarray, raw: np.ndarray) -> None:
    limit = np.float32(2 ** (codec.bits - 1) - 1)
    largest = np.abs(values).max(axis=1)
    largest[largest < _SMALLEST] = 0.0
    factors = np.divide(limit, largest, out=np.zeros_like(largest), where=largest > 0)
    raw[:, :4] = (largest / limit).astype("<f4").view(np.uint8).reshape(-1, 4)
    codes = np.clip(np.rint(values * factors[:, None]), -limit, limit).astype(np.int8)
    if codec.bits == 8:
        raw[:, 4:] = codes.view(np.uint8)
        return
    nibbles = np.full((len(values), 2 * (raw.shape[1] - 4)), 8, dtype=np.uint8)
    nibbles[:, : values.shape[1]] = codes + 8
    raw[:, 4:] = nibbles[:, ::2] | nibbles[:, 1::2] << 4


def _decode_uniform(codec: Codec, out: np.ndarray, raw: np.ndarray) -> None:
    codes = raw[:, 4:].view(np.int8)
    if codec.bits == 4:
        nibbles = np.stack((raw[:, 4:] & 15, raw[:, 4:] >> 4), axis=2).reshape(len(raw), -1)
        codes = nibbles[:, : out.shape[1]].astype(np.int8) - np.int8(8)
    np.multiply(codes.astype(np.float32), _scales(codec, raw), out=out)


# --- a sign and one of two magnitudes ---------------------------------------------------------------------------


def _write_levels(values: np.ndarray, raw: np.ndarray) -> None:
    """Scales and codes of ``values`` (r, n) at the beginning of each row of ``raw``.

    The magnitudes are split at their mean, then in the middle between the means of both sides (a step of Lloyd's).
    """
    magnitudes = np.abs(values).astype(np.float64)
    split = magnitudes.mean(axis=1, keepdims=True)
    for _ in range(2):
        above = magnitudes > split
        count = above.sum(axis=1, keepdims=True)
        high = np.where(above, magnitudes, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
        low = np.where(above, 0.0, magnitudes).sum(axis=1, keepdims=True) / np.maximum(values.shape[1] - count, 1)
        split = (low + high) / 2
    raw[:, :8] = np.concatenate((low, high), axis=1).astype("<f4").view(np.uint8)
    codes = np.zeros((len(values), -(-values.shape[1] // 4) * 4), dtype=np.uint8)
    codes[:, : values.shape[1]] = np.signbit(values) | above.astype(np.uint8) << 1
    quads = codes.reshape(len(values), -1, 4)
    raw[:, 8 : 8 + quads.shape[1]] = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def _read_levels(codec: Codec, raw: np.ndarray, count: int) -> np.ndarray:
    low, high = _scales(codec, raw).T[..., None]
    table = np.concatenate((low, -low, high, -high), axis=1)  # (r, 4): what each code stands for
    packed = raw[:, 8 : 8 + -(-count // 4)]
    codes = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(len(raw), -1)[:, :count]
    values: np.ndarray = np.take_along_axis(table, codes.astype(np.intp), axis=1)
    return values


def _encode_levels(codec: Codec, values: np.ndarray, raw: np.ndarray) -> None:
    _write_levels(values, raw)


def _decode_levels(codec: Codec, out: np.ndarray, raw: np.ndarray) -> None:
    out[:] = _read_levels(codec, raw, out.shape[1])


# --- the largest values alone -----------------------------------------------------------------------------------


def _encode_indexed(codec: Codec, values: np.ndarray, raw: np.ndarray) -> None:
    rows, count = values.shape
    sent, low = codec.num_sent(count), codec.low_bits(count)
    magnitudes = np.abs(values)
    least = np.partition(magnitudes, count - sent, axis=1)[:, count - sent, None]
    chosen, ties = magnitudes > least, magnitudes == least
    chosen |= ties & (np.cumsum(ties, axis=1) <= sent - chosen.sum(axis=1, keepdims=True))  # the first of equal ones
    indices = np.nonzero(chosen)[1].reshape(rows, sent)
    _write_levels(np.take_along_axis(values, indices, axis=1), raw)
    begin, size = sum(codec.parts(count)[:2]), codec.parts(count)[2]
    bits = indices[..., None] >> np.arange(low) & 1
    raw[:, begin : begin + size] = np.packbits(bits.reshape(rows, -1).astype(np.uint8), axis=1, bitorder="little")
    bitmap = np.zeros((rows, 8 * codec.parts(count)[3]), dtype=np.uint8)
    np.put_along_axis(bitmap, (indices >> low) + np.arange(sent), 1, axis=1)
    raw[:, begin + size :] = np.packbits(bitmap, axis=1, bitorder="little")


def _bitmap(codec: Codec, count: int, raw: np.ndarray) -> np.ndarray:
    """The bitmap of each row, a byte for a bit."""
    return np.unpackbits(raw[:, sum(codec.parts(count)[:3]) :], axis=1, bitorder="little")


def _indices(codec: Codec, count: int, raw: np.ndarray, bitmap: np.ndarray) -> np.ndarray:
    """Indices of a block of ``count`` values, (r, k), from a bitmap with k bits in each row."""
    sent, low = codec.num_sent(count), codec.low_bits(count)
    begin, size = sum(codec.parts(count)[:2]), codec.parts(count)[2]
    high = np.nonzero(bitmap)[1].reshape(len(raw), sent) - np.arange(sent)
    bits = np.unpackbits(raw[:, begin : begin + size], axis=1, bitorder="little")[:, : sent * low]
    lows = (bits.reshape(len(raw), sent, low).astype(np.int64) << np.arange(low)).sum(axis=2)
    indices: np.ndarray = high << low | lows
    return indices


def _decode_indexed(codec: Codec, out: np.ndarray, raw: np.ndarray) -> None:
    count = out.shape[1]
    out[:] = 0.0
    indices = _indices(codec, count, raw, _bitmap(codec, count, raw))
    np.put_along_axis(out, indices, _read_levels(codec, raw, codec.num_sent(count)), axis=1)
