"""Loader of the optional native part ``edgefed/_native.so``: a shared library with the C interface of csrc/edgefed.h.

The library links neither Python nor torch, so this module needs ctypes alone. Where it was not built, everything
that uses it has a numpy form; whether one may be taken is the caller's decision, not this module's.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgefed.errors import ConfigError

ABI_VERSION = 2
_SUFFIXES = (".so", ".dylib", ".dll")
ISA_CODES = {"scalar": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3, "neon": 10}
"""enum EfIsa: instruction sets that kernels are written for; `EDGEFED_ISA` names one to force it."""
DTYPE_CODES = {"float64": 0, "float32": 1, "float16": 2, "bfloat16": 3, "nf4": 16, "int8": 17}
"""enum EfDtype and enum EfFormat."""


class NativeUnavailable(Exception):
    """The native part cannot be used; the message says why. Never leaves the package: see `kernels.fold`."""


def find_native() -> Path:
    """Path of the built library beside this file. Raises NativeUnavailable when there is none."""
    return find_library("_native", "a C++ compiler")


def find_library(stem: str, built_with: str) -> Path:
    """Path of a library of this package. Raises NativeUnavailable when there is none, naming what it is built with."""
    folder = Path(__file__).parent
    for path in sorted(folder.glob(f"{stem}*")):
        if path.suffix in _SUFFIXES:
            return path
    raise NativeUnavailable(f"no {stem} library in {folder}: the package was built without {built_with}")


@functools.lru_cache(maxsize=8)
def load_native(path: Path | None = None) -> ctypes.CDLL:
    """Load the library at ``path``, or the one of this package, and declare its functions.

    Raises NativeUnavailable when it is missing, built for another machine, or of another interface version.
    """
    return load_library(path or find_native(), "ef_abi_version", ABI_VERSION, _FUNCTIONS)


def load_library(
    path: Path, version_function: str, abi_version: int, functions: Mapping[str, Sequence[type]]
) -> ctypes.CDLL:
    """Load a library with a C interface and declare its ``functions``: result, then arguments, of each by name.

    Raises NativeUnavailable when it cannot be loaded, is of another interface version, or lacks one of them.
    """
    try:
        library = ctypes.CDLL(str(path))
        version = getattr(library, version_function)()
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"{path} cannot be loaded: {error}") from error
    if version != abi_version:
        raise NativeUnavailable(f"{path} has interface version {version}, this edgefed needs {abi_version}: rebuild it")
    for name, (result, *arguments) in functions.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise NativeUnavailable(f"{path} has no function {name}: rebuild it") from error
        function.argtypes, function.restype = arguments, result
    return library


def isa_names(library: ctypes.CDLL) -> list[str]:
    """The instruction sets that kernels are written for and that this processor has, best first."""
    best = [name for name, code in sorted(ISA_CODES.items(), key=lambda item: -item[1])]
    return [name for name in best if library.ef_has_isa(ISA_CODES[name])]


def setting(name: str) -> str | None:
    """``os.environ.get(name)``, which takes twice as long where there is none: every call of a kernel asks."""
    if name not in os.environ:
        return None
    return os.environ[name]


def isa_code(library: ctypes.CDLL, requested: str | None = None) -> int:
    """Code of the instruction set ``requested``, or of the one that EDGEFED_ISA names, or of the best one.

    Raises ConfigError when that one is unknown, or not on this processor.
    """
    requested = requested or setting("EDGEFED_ISA")
    if not requested:
        return _best_isa(library)
    if requested not in ISA_CODES or not library.ef_has_isa(ISA_CODES[requested]):
        raise ConfigError(
            f"instruction set {requested!r} was asked for, this processor has {', '.join(isa_names(library))}",
            remedy="Set EDGEFED_ISA to one of them, or leave it out to take the best.",
        )
    return ISA_CODES[requested]


@functools.lru_cache(maxsize=8)
def _best_isa(library: ctypes.CDLL) -> int:
    return library.ef_best_isa()


class ExpertGroup(ctypes.Structure):
    """struct EfGroup: the rows of x that meet one expert's matrix."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("row_begin", ctypes.c_int64),
        ("row_count", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("blocksize", ctypes.c_int32),
    ]


_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
_FUNCTIONS: dict[str, list[type]] = {
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
