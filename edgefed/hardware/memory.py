"""Sizes as text, the memory that this process and the machine use, and the C library's allocator.

glibc takes blocks from three places. Blocks above a threshold are mapped, and returned to the system when they are
freed. Smaller ones lie in a heap, or in one of several arenas, and memory between two blocks in use stays resident. The
threshold grows to the size of the largest freed block, up to 32 MiB, so the tensors of a training step soon lie in the
heap: 4.9 GiB of freed memory stayed resident with a budget of 6 GiB. `set_up_allocator` fixes the threshold.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from edgefed.errors import ConfigError

GIB = 2**30
_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_UNITS |= {f"{prefix}ib": size for prefix, size in _UNITS.items() if prefix not in ("", "b")}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}


LEAST_BARE = 2**20
"""A size in bytes below this is a forgotten unit: no device trains in less than 1 MiB."""


def parse_bytes(text: str) -> int:
    """Read a size: ``2GiB`` and ``2G`` are 2 * 2**30, ``2GB`` is 2 * 10**9, a bare number is bytes.

    Raises ConfigError for an invalid size, one that is not above zero, and a bare number below `LEAST_BARE`, where a
    unit was forgotten.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    number = float(match[1]) if match else 0.0
    size = int(number * unit) if unit else 0
    if match and not match[2] and 0 < number < LEAST_BARE:
        hint, size = f": it has no unit. Did you mean {match[1]}{'GiB' if number < 256 else 'MiB'}?", 0
    else:
        hint = ""
    if size <= 0:
        raise ConfigError(f"invalid memory size {text!r}{hint}", remedy="Write it like 2GiB, 512MiB or 1500MB.")
    return size


def format_bytes(size: float) -> str:
    """A size for people, in binary units with three significant digits: ``11.1 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.{0 if abs(size) >= 100 else 1}f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


MMAP_THRESHOLD_BYTES = 2**20
"""Larger blocks are mapped."""
TRIM_THRESHOLD_BYTES = 8 * 2**20
"""Free memory at the end of the heap beyond this is returned at once."""
ARENAS = 1
COMPILED_PRODUCTS = "256"
"""Products that oneDNN keeps compiled, instead of 1,024: a training step has fewer (`edgefed.kernels.row_sizes`)."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


@functools.lru_cache(maxsize=1)
def set_up_allocator() -> bool:
    """Let this process return freed tensors to the system, so that its resident memory follows what it uses.

    Call it before threads and large blocks exist. Returns whether it applies: only to glibc, and not where the
    environment sets up malloc (MALLOC_*_, GLIBC_TUNABLES). musl, macOS and Windows return large blocks by themselves.
    It also bounds the two caches of compiled products that oneDNN has, unless the environment does.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read when the first product is compiled
        os.environ.setdefault(cache, COMPILED_PRODUCTS)
    names = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    if any(name in os.environ for name in names) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = _c_function("mallopt")
    if mallopt is None:
        return False
    values = (
        (_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES),
        (_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES),
        (_M_ARENA_MAX, ARENAS),
    )
    return all([mallopt(name, value) for name, value in values])


def trim_memory() -> None:
    """Return the allocator's free memory to the system, where it can: glibc's `malloc_trim`."""
    if malloc_trim := _c_function("malloc_trim"):
        malloc_trim(0)


def _c_function(name: str) -> Callable[..., int] | None:
    """A function that only glibc has; None elsewhere."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - musl has an empty mallopt
        function: Callable[..., int] = getattr(library, name)
        return function
    return None


def process_rss_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def available_memory_bytes() -> int:
    """Memory that programs can allocate on this machine without swapping."""
    return psutil.virtual_memory().available


def process_peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> bool:
    """Set VmHWM to the present size (proc(5): 5 in clear_refs). False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status_bytes(field: str) -> int | None:
    """A size of this process by its name in /proc/self/status, such as VmHWM; None where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
