"""Loader of the optional native library ``edgefed/_native.so``, which has the C interface of csrc/edgefed.h.

The library links neither Python nor torch, so this module needs only ctypes. Every user of the library also has a form
without it; the caller decides whether to use that form.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgefed.errors import ConfigError

ABI_VERSION = 2
_SUFFIXES = (".so", ".dylib", ".dll")
ISA_CODES = {"scalar": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3, "amx": 4, "neon": 10}
"""enum EfIsa: instruction sets that have kernels; the environment variable EDGEFED_ISA forces one."""
DTYPE_CODES = {"float64": 0, "float32": 1, "float16": 2, "bfloat16": 3, "nf4": 16, "int8": 17}
"""enum EfDtype and enum EfFormat."""


class NativeUnavailable(Exception):
    """The native library is unavailable; the message is the reason. Internal to the package: see `kernels.fold`."""


def find_native() -> Path:
    """Return the path of the built library beside this file. Raises NativeUnavailable if it is missing."""
    return find_library("_native", "a C++ compiler")


def find_library(stem: str, built_with: str) -> Path:
    """Return the path of a library of this package. Raises NativeUnavailable, naming what builds it, if missing."""
    folder = Path(__file__).parent
    for path in sorted(folder.glob(f"{stem}*")):
        if path.suffix in _SUFFIXES:
            return path
    raise NativeUnavailable(f"no {stem} library in {folder}: the package was built without {built_with}")


@functools.lru_cache(maxsize=8)
def load_native(path: Path | None = None) -> ctypes.CDLL:
    """Load the library at ``path``, by default the one of this package, and declare its functions.

    Raises NativeUnavailable if it is missing, built for another machine, or of another interface version.
    """
    return load_library(path or find_native(), "ef_abi_version", ABI_VERSION, _FUNCTIONS)


def load_library(
    path: Path, version_function: str, abi_version: int, functions: Mapping[str, Sequence[type[Any]]]
) -> ctypes.CDLL:
    """Load a library with a C interface and declare its ``functions``: by name, the result and the arguments.

    Raises NativeUnavailable if it cannot be loaded, has another interface version, or lacks a function.
    """
    try:
        library = ctypes.CDLL(str(path))
        version = getattr(library, version_function)()
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"cannot load {path}: {error}") from error
    if version != abi_version:
        raise NativeUnavailable(f"{path} has interface version {version}, expected {abi_version}: rebuild it")
    for name, (result, *arguments) in functions.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise NativeUnavailable(f"{path} lacks the function {name}: rebuild it") from error
        function.argtypes, function.restype = arguments, result
    return library


def isa_names(library: ctypes.CDLL) -> list[str]:
    """Return the instruction sets of this processor that have kernels, best first."""
    best = [name for name, code in sorted(ISA_CODES.items(), key=lambda item: -item[1])]
    return [name for name in best if library.ef_has_isa(ISA_CODES[name])]


def setting(name: str) -> str | None:
    """Return ``os.environ.get(name)``, in half the time if it is unset: every kernel call reads two settings."""
    if name not in os.environ:
        return None
    return os.environ[name]


def isa_code(library: ctypes.CDLL, requested: str | None = None) -> int:
    """Return the code of the instruction set ``requested``, by default that of EDGEFED_ISA, else the best one.

    Raises ConfigError if it is unknown, or this processor lacks it.
    """
    requested = requested or setting("EDGEFED_ISA")
    if not requested:
        return _best_isa(library)
    if requested not in ISA_CODES or not library.ef_has_isa(ISA_CODES[requested]):
        raise ConfigError(
            f"invalid instruction set {requested!r}: this processor has {', '.join(isa_names(library))}",
            remedy="Set EDGEFED_ISA to one of them, or unset it to use the best.",
        )
    return ISA_CODES[requested]


@functools.lru_cache(maxsize=8)
def _best_isa(library: ctypes.CDLL) -> int:
    return int(library.ef_best_isa())


@functools.lru_cache(maxsize=32)
def dtype_code(dtype: object) -> int:
    """Return the code of a torch dtype. Raises KeyError for one that the library does not know."""
    return DTYPE_CODES[str(dtype).removeprefix("torch.")]


class ExpertGroup(ctypes.Structure):
    """struct EfGroup: the rows of x that are multiplied with one expert's matrix."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("row_begin", ctypes.c_int64),
        ("row_count", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("blocksize", ctypes.c_int32),
    ]


_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
_FUNCTIONS: dict[str, list[type[Any]]] = {
    "ef_first_nonfinite": [_L, _P, _I, _L],
    "ef_fold_block": [_L, _P, _P, _I, _L, _D],
    "ef_narrow_block": [_L, _P, _P, _I, _L],
    "ef_best_isa": [_I],
    "ef_has_isa": [_I, _I],
    "ef_quantize_nf4": [_L, _P, _I, _L, _L, _P, _P, _I, _I],
    "ef_quantize_int8": [_L, _P, _I, _L, _L, _P, _P, _I, _I],
    "ef_dequantize_nf4": [_L, _P, _P, _L, _L, _P, _I, _I, _I],
    "ef_dequantize_int8": [_L, _P, _P, _L, _L, _P, _I, _I, _I],
    "ef_unnest_scales": [_L, _P, _P, _P, _P, _L, _L, _L, _P, _I],
    "ef_sort_pairs": [_L, _P, _L, _L, _P, _P, _P],
    "ef_can_matmul": [_I, _I, _I, _I, _L, _L, _I, _I, _I],
    "ef_grouped_matmul": [_L, _P, _L, _P, _P, _P, _I, _L, _L, _I, _I, _I, _I],
    "ef_outer_bf16": [_L, _P, _P, _P, _P, _L, _L, _L, _I, _I],
    "ef_combine": [_L, _P, _P, _P, _P, _I, _L, _L, _L, _I],
    "ef_swiglu": [_L, _P, _P, _I, _L, _L, _I, _I],
    "ef_swiglu_backward": [_L, _P, _P, _P, _P, _P, _P, _I, _L, _L, _I, _I],
    "ef_router_statistics": [_L, _P, _P, _I, _I, _P, _P, _I, _L, _L, _L, _I, _I],
    "ef_arithmetic_steps": [_L, _I, _L, _I],
}
"""Result and arguments of each function of csrc/edgefed.h."""
