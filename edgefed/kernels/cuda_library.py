"""Loader of the optional CUDA library ``edgefed/_cuda.so``, which has the C interface of csrc/edgefed_cuda.h.

It contains the CUDA runtime, links neither Python nor torch, and loads on a machine without a driver. This module needs
only ctypes; `edgefed.kernels.cuda_kernels` calls the functions with tensors.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from edgefed.native import NativeUnavailable, find_library, load_library

ABI_VERSION = 3
ROWS, TILES, PLAIN = 0, 1, 2
"""enum EfCudaKernel."""


class CudaMatrix(ctypes.Structure):
    """struct EfCudaMatrix: the operand of one slot in a product. All zero: the slot is skipped."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("format", ctypes.c_int32),
        ("blocksize", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("block_shift", ctypes.c_int32),
    ]


class CudaLowRank(ctypes.Structure):
    """struct EfCudaLowRank: the low-rank term of a product."""

    _fields_ = [("low", ctypes.c_void_p), ("rank", ctypes.c_int64), ("dtype", ctypes.c_int32)]


def find_cuda() -> Path:
    """Return the path of the built library. Raises NativeUnavailable if it is missing."""
    return find_library("_cuda", "nvcc, or without a GPU (EDGEFED_CUDA=1)")


@functools.lru_cache(maxsize=8)
def load_cuda(path: Path | None = None) -> ctypes.CDLL:
    """Load the library at ``path``, by default the one of this package, and declare its functions.

    Raises NativeUnavailable if it is missing, built for another machine, or of another interface version.
    """
    return load_library(path or find_cuda(), "ef_cuda_abi_version", ABI_VERSION, _FUNCTIONS)


def why_not_cuda(device: int = 0) -> str | None:
    """Return why the library's kernels cannot run on a device, or None."""
    try:
        library = load_cuda()
    except NativeUnavailable as error:
        return str(error)
    code = library.ef_cuda_device_ready(device)
    return None if code == 0 else f"CUDA device {device} cannot run them: {error_text(library, code)}"


def error_text(library: ctypes.CDLL, code: int) -> str:
    """Describe a result other than 0."""
    if code > 0:
        return f"{library.ef_cuda_error_text(code).decode()} (CUDA error {code})"
    return {-2: "unknown dtype", -3: "no kernel for this shape"}.get(code, f"code {code}")


_P, _I, _L, _S = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p
_FUNCTIONS: dict[str, list[type[Any]]] = {
    "ef_cuda_abi_version": [_I],
    "ef_cuda_device_ready": [_I, _I],
    "ef_cuda_error_text": [_S, _I],
    "ef_cuda_work_size": [_L, _L],
    "ef_cuda_sort_scratch": [_L, _L, _L],
    "ef_cuda_sort_pairs": [_I, _P, _L, _L, _I, _P, _P, _P, _P, _P, _I, _P],
    "ef_cuda_can_matmul": [_I, _I, _I, _I, _L, _L, _I, _I, _I],
    "ef_cuda_grouped_matmul": [_I, _P, _L, _P, _L, _P, _P, _P, _I, _L, _L, _I, _I, _P, _I, _I, _P],
    "ef_cuda_grouped_outer": [_I, _P, _P, _L, _P, _P, _P, _P, _I, _I, _L, _L, _I, _P],
    "ef_cuda_combine": [_I, _P, _P, _P, _P, _I, _L, _L, _L, _I, _P],
    "ef_cuda_spread": [_I, _P, _P, _P, _P, _P, _L, _P, _I, _L, _L, _I, _P],
    "ef_cuda_pair_dots": [_I, _P, _P, _P, _P, _P, _P, _L, _P, _I, _L, _L, _I, _P],
    "ef_cuda_swiglu": [_I, _P, _P, _L, _P, _I, _L, _L, _I, _P],
    "ef_cuda_swiglu_backward": [_I, _P, _P, _P, _P, _P, _L, _P, _P, _P, _I, _L, _L, _I, _P],
    "ef_cuda_statistics_scratch": [_L, _L, _L],
    "ef_cuda_router_statistics": [_I, _P, _P, _I, _I, _P, _P, _I, _P, _L, _L, _L, _P, _I, _P],
    "ef_cuda_quantize_nf4": [_I, _P, _I, _L, _L, _P, _P, _P, _I, _P],
    "ef_cuda_quantize_int8": [_I, _P, _I, _L, _L, _P, _P, _P, _I, _P],
    "ef_cuda_dequantize_nf4": [_I, _P, _P, _L, _L, _P, _I, _I, _P],
    "ef_cuda_dequantize_int8": [_I, _P, _P, _L, _L, _P, _I, _I, _P],
}
"""Result and arguments of each function of csrc/edgefed_cuda.h."""
