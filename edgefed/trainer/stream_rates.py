"""Measures what a device computes and reads, for the time of a step with streamed experts (`edgefed.costs.streaming`).

A matrix product, a copy in memory, and the source of the stream: the link to a GPU, or a file in the folder where the
experts would be. A file that the system can keep in its page cache is read at the rate of the cache.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from edgefed.costs.streaming import StreamRates
from edgefed.disk import disk_errors

PIECE_BYTES = 32 * 2**20
REPEATS = 3


@functools.lru_cache(maxsize=16)
def measure_stream_rates(folder: Path, device: str, dtype: str, *, cached: bool) -> StreamRates:
    """Measure the rates of ``device``, once per process, with products in ``dtype``; takes about a second.

    ``cached``: the system has memory to keep what it reads. Raises StorageError if ``folder`` cannot be written to.
    """
    where, kind = torch.device(device), getattr(torch, dtype)
    left, right = torch.ones(512, 1024, dtype=kind, device=where), torch.ones(1024, 1024, dtype=kind, device=where)
    flops_per_s = 2 * 512 * 1024 * 1024 / _least_seconds(lambda: left @ right, where)
    block = torch.ones(PIECE_BYTES, dtype=torch.uint8, device=where)
    memory_bytes_per_s = 2 * PIECE_BYTES / _least_seconds(block.clone, where)
    if where.type == "cuda":
        host = torch.ones(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        seconds = _least_seconds(lambda: block.copy_(host, non_blocking=True), where)
    else:
        seconds = _read_seconds(folder, cached)
    return StreamRates(flops_per_s, memory_bytes_per_s, PIECE_BYTES / seconds)


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(1 + REPEATS):  # the first one warms up
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _read_seconds(folder: Path, cached: bool) -> float:
    """Seconds to read a new file of `PIECE_BYTES`, from the page cache if ``cached``, else from the disk."""
    while not folder.exists():  # a preview creates nothing
        folder = folder.parent
    buffer = bytearray(os.urandom(1 << 20)) * (PIECE_BYTES >> 20)  # some disks compress
    with disk_errors(folder), tempfile.NamedTemporaryFile(dir=folder, prefix=".edgefed-rate-") as file:
        file.write(buffer)
        file.flush()
        os.fsync(file.fileno())
        best = float("inf")
        for _ in range(REPEATS):
            if not cached and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            file.seek(0)
            file.readinto(buffer)
            best = min(best, time.perf_counter() - started)
    return best
