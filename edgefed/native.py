"""Loader of the optional native part ``edgefed/_native.so``: a shared library with the C interface of csrc/edgefed.h.

The library links neither Python nor torch, so this module needs ctypes alone. Where it was not built, everything
that uses it has a numpy form; whether one may be taken is the caller's decision, not this module's.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

ABI_VERSION = 1
_SUFFIXES = (".so", ".dylib", ".dll")


class NativeUnavailable(Exception):
    """The native part cannot be used; the message says why. Never leaves the package: see `kernels.fold`."""


def find_native() -> Path:
    """Path of the built library beside this file. Raises NativeUnavailable when there is none."""
    folder = Path(__file__).parent
    for path in sorted(folder.glob("_native*")):
        if path.suffix in _SUFFIXES:
            return path
    raise NativeUnavailable(f"no _native library in {folder}: the package was built without a C++ compiler")


@functools.lru_cache(maxsize=8)
def load_native(path: Path | None = None) -> ctypes.CDLL:
    """Load the library at ``path``, or the one of this package, and declare its functions.

    Raises NativeUnavailable when it is missing, built for another machine, or of another interface version.
    """
    path = path or find_native()
    try:
        library = ctypes.CDLL(str(path))
        version = library.ef_abi_version()
    except (OSError, AttributeError) as fault:
        raise NativeUnavailable(f"{path} cannot be loaded: {fault}") from fault
    if version != ABI_VERSION:
        raise NativeUnavailable(f"{path} has interface version {version}, this edgefed needs {ABI_VERSION}: rebuild it")
    pointer, int32, int64, double = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
    for name, arguments in {
        "ef_first_nonfinite": [pointer, int32, int64],
        "ef_fold_block": [pointer, pointer, int32, int64, double],
        "ef_narrow_block": [pointer, pointer, int32, int64],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, int64
    return library
