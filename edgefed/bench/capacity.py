"""Capacity: is the planned memory really available, and how fast is the disk at the size of an expert?

**Memory.** A budget is computed from sensors, some of which are wrong (unified memory). Where Windows lends system
memory to a GPU, an allocation succeeds but is slow. So the memory is allocated, every page is written, and the copy
speeds of the first and the last blocks are compared.

**Disk.** The disk decides how fast a plan downloads and a profile streams. The test file has no name from the moment it
is open (`tempfile.TemporaryFile`), so it never stays behind. Reads from the page cache would measure memory: the cache
is dropped with posix_fadvise and then checked (preadv2 with RWF_NOWAIT).
"""

from __future__ import annotations

import errno
import functools
import io
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from edgefed.bench.compute import Stopwatch
from edgefed.bench.report import MemoryCheck
from edgefed.bench.statistics import Entry, Sampling, collect
from edgefed.disk import MEMORY_FILESYSTEMS, filesystem
from edgefed.hardware.memory import format_bytes

MIB = 2**20
STEP_BYTES = 256 * MIB
SPILL_BELOW = 0.5
"""The GPU's memory has spilled if the last blocks copy below this share of the first blocks' speed."""
SINGLE_BLOCK_STEPS = 4
"""Halvings in the search for the largest single block: the result is exact to a sixteenth."""
BLOCK = 4 * MIB
"""Size of one write or sequential read."""
RANDOM_BLOCK = MIB
KEEP_FREE = 2**30
"""Bytes of the disk that stay free during the test."""
PROBES = 64
"""Number of places at which the page cache is checked."""
DROPPED_BELOW = 0.1
"""Share of the probes that may still be in the cache when a read counts as uncached."""


# --- memory -----------------------------------------------------------------------------------------------------


def verify_memory(
    watch: Stopwatch,
    asked_bytes: int,
    room_bytes: Callable[[], int | None],
    is_out_of_memory: Callable[[BaseException], bool],
    *,
    on_bytes: Callable[[int], None] = lambda size: None,
    limit_s: float = 60.0,
    step_bytes: int = STEP_BYTES,
) -> MemoryCheck:
    """Allocate ``asked_bytes`` in steps of 256 MiB, write every step, and release them.

    ``room_bytes`` is called before every step: bytes that may be allocated above the system's reserve. None (unknown)
    ends the test, because nothing would stop it in time. Errors other than a lack of memory are raised.
    """
    started = time.monotonic()
    blocks: list[torch.Tensor] = []
    taken, stopped, failed = 0, "", False
    try:
        while taken < asked_bytes and not stopped:
            step = min(step_bytes, asked_bytes - taken)
            room = room_bytes()
            if room is None:
                stopped = "the free memory is unknown"
            elif room < step:
                stopped = f"{format_bytes(max(0, room))} left above the system's reserve"
            elif time.monotonic() - started > limit_s:
                stopped = f"time limit of {limit_s:.0f} s"
            else:
                try:
                    blocks.append(torch.empty(step, dtype=torch.uint8, device=watch.device).fill_(1))
                    watch.synchronize()
                    taken += step
                    on_bytes(step)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    stopped, failed = f"out of memory after {format_bytes(taken)}", True
        share = _last_speed_share(watch, blocks)
    finally:
        blocks.clear()
        watch.release()
    return MemoryCheck(
        asked_bytes=asked_bytes,
        verified_bytes=taken,
        complete=taken >= asked_bytes,
        stopped=stopped,
        seconds=time.monotonic() - started,
        last_speed_share=share,
        spilled=share is not None and share < SPILL_BELOW,
        largest_block_bytes=_largest_block(watch, taken, is_out_of_memory) if taken else None,
        out_of_memory=failed,
    )


def _last_speed_share(watch: Stopwatch, blocks: list[torch.Tensor]) -> float | None:
    if len(blocks) < 4:
        return None
    first, last = blocks[0], blocks[-2]  # the very last may be a smaller one
    speeds = []
    for target, source in ((blocks[1], first), (blocks[-3], last)):
        copy = functools.partial(target.copy_, source)
        watch.seconds(copy)
        speeds.append(1 / max(1e-9, min(watch.seconds(copy) for _ in range(3))))
    return speeds[1] / speeds[0]


def _largest_block(watch: Stopwatch, size: int, is_out_of_memory: Callable[[BaseException], bool]) -> int | None:
    """Search the largest single allocation by bisection."""
    low, high = 0, size
    attempt = size
    for _ in range(SINGLE_BLOCK_STEPS + 1):
        try:
            block = torch.empty(attempt, dtype=torch.uint8, device=watch.device)
            del block
            low = attempt
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            high = attempt
        watch.release()
        if low == size:
            break
        attempt = (low + high) // 2
    return low or None


# --- disk -------------------------------------------------------------------------------------------------------


class DiskTest:
    """A file without a name on the disk of ``folder``, of ``size_bytes`` or what the disk allows; a context manager.

    ``refused`` is the reason if too little is free for a test. Call `write` before `read`. Raises OSError (no
    permission, no such directory, read-only).
    """

    def __init__(self, folder: Path, size_bytes: int):
        free = shutil.disk_usage(folder).free
        self.size = min(size_bytes, (free - KEEP_FREE) // BLOCK * BLOCK)
        self.refused = "" if self.size >= 4 * BLOCK else f"{free // MIB} MiB free, {KEEP_FREE // MIB} must stay free"
        kind = filesystem(folder)
        self._in_memory = kind in MEMORY_FILESYSTEMS
        self._params = {"folder_free_bytes": free, "file_bytes": self.size, "filesystem": kind}
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by __exit__
        self._written = False

    def __enter__(self) -> DiskTest:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, sampling: Sampling) -> Entry:
        """Measure a sequential write of the whole file, fsync included, in MB/s."""
        noise = random.Random(0).randbytes(BLOCK)  # incompressible, for disks that compress

        def sample() -> float:
            os.lseek(self._file.fileno(), 0, os.SEEK_SET)
            started = time.perf_counter()
            for index in range(self.size // BLOCK):
                # Distinct blocks, for disks that deduplicate.
                _write_all(self._file, index.to_bytes(8, "little") + noise[8:])
            os.fsync(self._file.fileno())
            self._written = True
            return self.size / 1e6 / (time.perf_counter() - started)

        samples, _ = collect(sample, sampling)
        return Entry.of(
            "disk write", "MB/s", samples, params={**self._params, "block_bytes": BLOCK},
            note="in memory (tmpfs), not on a disk" if self._in_memory else "with fsync",
        )  # fmt: skip

    def read(self, name: str, piece: int, scattered: bool, sampling: Sampling) -> Entry:
        """Measure uncached reads of ``piece`` bytes, in sequence or at random places without repetition, in MB/s."""
        if not self._written:
            raise OSError(errno.ENODATA, "nothing was written before the read")
        piece = min(piece, self.size)
        buffer = bytearray(piece)
        places = list(range(0, self.size - piece + 1, piece))
        if scattered:
            random.Random(1).shuffle(places)
            places = places[: max(1, 64 * MIB // piece)]
        cached: list[float] = []

        def sample() -> float:
            drop_cache(self._file.fileno())
            share = cached_share(self._file.fileno(), self.size)
            cached.append(math.nan if share is None else share)
            started = time.perf_counter()
            for place in places:
                _read_into(self._file, buffer, place)
            return len(places) * piece / 1e6 / (time.perf_counter() - started)

        samples, _ = collect(sample, sampling)
        worst = None if any(map(math.isnan, cached)) else max(cached)
        params = {**self._params, "block_bytes": piece, "reads_per_sample": len(places), "cached_share": worst}
        return Entry.of(name, "MB/s", samples, note=self._cache_note(worst), params=params)

    def _cache_note(self, cached: float | None) -> str:
        if self._in_memory:
            return "in memory (tmpfs), not on a disk"
        if cached is None:
            return "cache state unknown"
        return f"{100 * cached:.0f} % from the cache" if cached > DROPPED_BELOW else "cache dropped"


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _read_into(file: io.FileIO, buffer: bytearray, place: int) -> None:
    os.lseek(file.fileno(), place, os.SEEK_SET)
    view, done = memoryview(buffer), 0
    while done < len(buffer):
        count = file.readinto(view[done:])
        if not count:
            raise OSError(errno.EIO, "the file is shorter than what was written to it")
        done += count


def drop_cache(descriptor: int) -> None:
    """Ask the kernel to drop a file's pages, which must be on the disk already. Does nothing if unsupported."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(descriptor: int, size: int) -> float | None:
    """Estimate the share of a file's pages in the page cache, by a sample of them.

    None if unsupported: it needs Linux 4.14 and a filesystem that knows RWF_NOWAIT.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    buffer, hits = [bytearray(1)], 0
    for index in range(PROBES):
        try:
            hits += os.preadv(descriptor, buffer, index * (size // PROBES), os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except OSError:
            return None
    return hits / PROBES
