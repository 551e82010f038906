"""Sizes as text, and the memory that this process and the machine use."""

from __future__ import annotations

import re
import sys

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
