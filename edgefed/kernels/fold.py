"""Weighted sums of raw tensor blocks: the arithmetic of aggregation, always in float64.

    acc (n,) float64 += weight * raw (n,)        first_nonfinite, fold_block
    raw (n,) of the unit's dtype = round(acc)    narrow_block

``raw`` holds the bits of a float dtype of a tensor frame (`edgefed.protocol.frames.storage_dtype`: BF16 as uint16).
Product and sum are rounded separately, by 2**-53 each, so the error of even 2**20 clients is far below the last bit of
a float32 result. Elements are independent: block size, threads and vector width never change a bit.

Two backends give the same bits (tests/kernels/test_fold.py): ``numpy`` is the specification; ``native`` (csrc/fold.cpp)
avoids temporaries and releases the interpreter lock. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgefed.errors import ConfigError
from edgefed.native import NativeUnavailable, load_native
from edgefed.protocol.frames import FLOAT_DTYPES, narrow, storage_dtype, widen

logger = logging.getLogger(__name__)

_NATIVE_DTYPE = {"F64": 0, "F32": 1, "F16": 2, "BF16": 3}  # enum EfDtype of csrc/edgefed.h
_EXPONENT: dict[str, np.unsignedinteger] = {
    "F64": np.uint64(0x7FF0000000000000), "F32": np.uint32(0x7F800000),
    "F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80),
}  # fmt: skip


# --- the specification ------------------------------------------------------------------------------------------


def first_nonfinite_reference(raw: np.ndarray, dtype: str) -> int:
    """Return the index of the first infinity or NaN in ``raw`` (n,), or -1."""
    exponent = _EXPONENT[dtype]
    bad = (raw.view(exponent.dtype) & exponent) == exponent
    return int(bad.argmax()) if bad.any() else -1


def fold_block_reference(accumulator: np.ndarray, raw: np.ndarray, dtype: str, weight: float) -> int:
    """Compute ``accumulator += weight * raw``. Returns `first_nonfinite_reference`; adds only if that is -1."""
    bad = first_nonfinite_reference(raw, dtype)
    if bad < 0:
        accumulator += np.float64(weight) * widen(raw, dtype).astype(np.float64, copy=False)
    return bad


def narrow_block_reference(accumulator: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Round ``accumulator`` (n,) float64 into ``out`` (n,), the raw bits of ``dtype``: to nearest, ties to even."""
    with np.errstate(over="ignore"):  # values beyond the range become infinity, as in the native form
        out[:] = narrow(accumulator, dtype)


# --- dispatch ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FoldBackend:
    """One implementation of the three functions, "native" or "numpy". Arrays must be contiguous."""

    name: str
    first_nonfinite: Callable[[np.ndarray, str], int]
    fold_block: Callable[[np.ndarray, np.ndarray, str, float], int]
    narrow_block: Callable[[np.ndarray, str, np.ndarray], None]


NUMPY = FoldBackend("numpy", first_nonfinite_reference, fold_block_reference, narrow_block_reference)


def native_backend(library_path: Path | None = None) -> FoldBackend:
    """Return the backend of the native library. Raises NativeUnavailable."""
    library = load_native(library_path)

    def first_nonfinite(raw: np.ndarray, dtype: str) -> int:
        _check(raw, dtype)
        return int(library.ef_first_nonfinite(raw.ctypes.data, _NATIVE_DTYPE[dtype], raw.size))

    def fold_block(accumulator: np.ndarray, raw: np.ndarray, dtype: str, weight: float) -> int:
        _check(raw, dtype, accumulator)
        code = _NATIVE_DTYPE[dtype]
        return int(library.ef_fold_block(accumulator.ctypes.data, raw.ctypes.data, code, raw.size, weight))

    def narrow_block(accumulator: np.ndarray, dtype: str, out: np.ndarray) -> None:
        _check(out, dtype, accumulator)
        library.ef_narrow_block(accumulator.ctypes.data, out.ctypes.data, _NATIVE_DTYPE[dtype], out.size)

    return FoldBackend("native", first_nonfinite, fold_block, narrow_block)


def _check(raw: np.ndarray, dtype: str, accumulator: np.ndarray | None = None) -> None:
    """Check arrays whose pointers go to foreign code."""
    if dtype not in FLOAT_DTYPES or raw.dtype != storage_dtype(dtype) or not raw.flags.c_contiguous:
        raise ValueError(f"expected contiguous raw bits of a float dtype, found {raw.dtype} for {dtype}")
    if accumulator is not None and (
        accumulator.dtype != np.float64 or accumulator.shape != raw.shape or not accumulator.flags.c_contiguous
    ):
        raise ValueError(
            f"expected a float64 accumulator of {raw.shape}, found {accumulator.dtype} {accumulator.shape}"
        )


@functools.lru_cache(maxsize=4)
def select_backend(requested: str = "auto") -> FoldBackend:
    """Return a backend: "native", "numpy", or "auto", which prefers native and logs its choice once.

    Raises ConfigError if "native" is requested and unavailable, and for any other name.
    """
    if requested == "numpy":
        return NUMPY
    if requested not in ("auto", "native"):
        raise ConfigError(f"invalid fold backend {requested!r}, expected auto, native or numpy")
    try:
        backend = native_backend()
    except NativeUnavailable as error:
        if requested == "native":
            raise ConfigError(
                f"the requested fold backend native is unavailable: {error}",
                remedy="Install edgefed with a C++ compiler present, or request auto or numpy.",
            ) from error
        logger.info("aggregation uses numpy: %s", error)
        return NUMPY
    logger.info("aggregation uses the native library")
    return backend
