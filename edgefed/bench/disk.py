"""The disk at the size of an expert: what downloading a plan and streaming a profile will meet.

The file has no name from the moment it is open (`tempfile.TemporaryFile`), so nothing is left behind, whatever ends the
process. A read that the page cache answered would measure memory: the cache is dropped with posix_fadvise, and asked
afterwards (preadv2 with RWF_NOWAIT) whether it really let go.
"""

from __future__ import annotations

import errno
import math
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from edgefed.bench.statistics import Entry, Sampling, collect
from edgefed.disk import filesystem

MIB = 2**20
BLOCK = 4 * MIB
"""Of one write or sequential read call."""
RANDOM_BLOCK = MIB
KEEP_FREE = 2**30
"""The test leaves so much of the disk alone."""
PROBES = 64
"""Places at which the page cache is asked whether it still holds the file."""
DROPPED_BELOW = 0.1
"""Share of the probes that may still be in the cache for a read to count as one from the disk."""


class DiskTest:
    """A nameless file on the disk of ``folder``, as large as asked for or as the disk allows; use it in a `with`.

    ``refused`` says why there is no test when too little is free. `write` comes first: the reads need the file.
    Raises OSError (no permission, no such folder, read-only).
    """

    def __init__(self, folder: Path, size_bytes: int):
        free = shutil.disk_usage(folder).free
        self.size = min(size_bytes, (free - KEEP_FREE) // BLOCK * BLOCK)
        self.refused = "" if self.size >= 4 * BLOCK else f"{free // MIB} MiB free, {KEEP_FREE // MIB} must stay free"
        kind = filesystem(folder)
        self._in_memory = kind in ("tmpfs", "ramfs")
        self._params = {"folder_free_bytes": free, "file_bytes": self.size, "filesystem": kind}
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by __exit__
        self._written = False

    def __enter__(self) -> DiskTest:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, sampling: Sampling) -> Entry:
        """Sequential write of the whole file, fsync included. MB/s."""
        noise = random.Random(0).randbytes(BLOCK)  # a disk that compresses must not profit

        def sample() -> float:
            os.lseek(self._file.fileno(), 0, os.SEEK_SET)
            started = time.perf_counter()
            for index in range(self.size // BLOCK):
                # A block of its own each time, so that one that deduplicates does not profit either.
                _write_all(self._file, index.to_bytes(8, "little") + noise[8:])
            os.fsync(self._file.fileno())
            self._written = True
            return self.size / 1e6 / (time.perf_counter() - started)

        samples, _ = collect(sample, sampling)
        return Entry.of(
            "disk write", "MB/s", samples, params={**self._params, "block_bytes": BLOCK},
            note="memory (tmpfs), no disk" if self._in_memory else "with fsync",
        )  # fmt: skip

    def read(self, name: str, piece: int, scattered: bool, sampling: Sampling) -> Entry:
        """Uncached reads of ``piece`` bytes, one after the other or at random places without repetition. MB/s."""
        if not self._written:
            raise OSError(errno.ENODATA, "nothing was written to read back")
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
            return "memory (tmpfs), no disk"
        if cached is None:
            return "cache state unknown"
        return f"{100 * cached:.0f} % from the cache" if cached > DROPPED_BELOW else "cache dropped"


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _read_into(file: BinaryIO, buffer: bytearray, place: int) -> None:
    os.lseek(file.fileno(), place, os.SEEK_SET)
    view, done = memoryview(buffer), 0
    while done < len(buffer):
        count = file.readinto(view[done:])
        if not count:
            raise OSError(errno.EIO, "the file ended before what was written to it")
        done += count


def drop_cache(descriptor: int) -> None:
    """Ask the kernel to forget a file's pages; they must be on the disk already. Does nothing where it cannot."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(descriptor: int, size: int) -> float | None:
    """Share of a file's pages that can be read without the disk, by a sample of them. None where the kernel does not
    tell: it needs Linux 4.14 and a filesystem that knows RWF_NOWAIT.
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
