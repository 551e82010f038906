"""Blobs that the disk has damaged: found by their hash, named, and replaced by a copy that a client still has.

A blob is checked before its unit is folded, when a client says that what it got has another hash, and by an export. A
damaged one is deleted, which makes room for the copy: answers to heartbeats name what is wanted, and a client that has
it sends it. Its name is the hash of its content, so any client may.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

from edgefed.aggregator.blobs import BlobStore
from edgefed.disk import disk_errors, hash_file, sync_file, sync_folder, write_all
from edgefed.errors import ChecksumMismatch, NotFound, StorageError
from edgefed.protocol.messages import UnitInfo

logger = logging.getLogger(__name__)

MAX_WANTED = 8
"""Blobs that one answer to a heartbeat asks for."""
PATIENCE_S = 30.0
"""How long a round waits for copies before it goes on without the damaged units. Heartbeats come every 10 seconds."""
POLL_S = 0.1


def blob_problem(path: Path, sha256: str, size_bytes: int) -> str:
    """Why a blob is not what its name says; "" if it is. Raises StorageError for an unreadable disk."""
    if not path.is_file():
        return "is missing"
    found, found_bytes = hash_file(path)
    if (found, found_bytes) == (sha256, size_bytes):
        return ""
    return f"is damaged: {found_bytes} bytes with SHA-256 {found[:12]}, expected {size_bytes} with {sha256[:12]}"


class Repairs:
    """The damaged blobs of a run. Thread-safe."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs, self._lock = blobs, threading.Lock()
        self._wanted: dict[str, int] = {}
        self._whole: set[str] = set()

    def wanted(self) -> tuple[str, ...]:
        """Hashes of blobs that a client may send, some of them if there are many."""
        with self._lock:
            return tuple(itertools.islice(self._wanted, MAX_WANTED))

    def check_wanted(self, sha256: str) -> None:
        """Raise StorageError if the blob is known to be damaged: it may be whole later."""
        if sha256 in self._wanted:
            raise StorageError(f"blob {sha256[:12]} is damaged on the server's disk; the server waits for a copy")

    def check(self, name: str, sha256: str, size_bytes: int) -> bool:
        """Read a blob and compare its hash; ``name`` is for the log. Returns whether it is whole."""
        with self._lock:
            if sha256 in self._wanted:
                return False
        problem = blob_problem(self._blobs.path(sha256), sha256, size_bytes)
        if problem:
            self.mark(name, sha256, size_bytes, problem)
        else:
            self._whole.add(sha256)
        return not problem

    def check_once(self, name: str, sha256: str, size_bytes: int) -> bool:
        """`check`, unless this process has found the blob whole before. For slices, whose hash clients do not know."""
        return sha256 in self._whole or self.check(name, sha256, size_bytes)

    def mark(self, name: str, sha256: str, size_bytes: int, problem: str) -> None:
        """Note a damaged blob, and delete it."""
        with self._lock:
            if sha256 in self._wanted:
                return
            self._wanted[sha256] = size_bytes
        logger.error("blob %s of %r %s; waiting for a client that has a copy", sha256[:12], name, problem)
        self._blobs.delete([sha256])

    def damaged(
        self,
        units: Sequence[UnitInfo],
        *,
        threads: int,
        patience_s: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[UnitInfo]:
        """Check the blobs of units, wait for copies of damaged ones, and return those that none has come for.

        ``patience_s`` None: `PATIENCE_S`.
        """
        with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="check") as pool:
            whole = pool.map(lambda unit: self.check(unit.key, unit.sha256, unit.size_bytes), units)
            damaged = [unit for unit, fine in zip(units, whole, strict=True) if not fine]
        until = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
        while damaged and time.monotonic() < until and not cancelled():
            time.sleep(POLL_S)
            damaged = [unit for unit in damaged if unit.sha256 in self._wanted]
        return damaged

    async def receive(self, sha256: str, chunks: AsyncIterator[bytes]) -> None:
        """Store a copy of a damaged blob. Raises NotFound (not wanted), ChecksumMismatch, DiskFull."""
        size_bytes = self._wanted.get(sha256)
        if size_bytes is None:
            raise NotFound(f"blob {sha256[:64]!r} is not wanted")
        loop = asyncio.get_running_loop()
        path, file = self._blobs.open_temporary()
        digest, size = hashlib.sha256(), 0
        try:
            async for chunk in chunks:
                size += len(chunk)
                if size > size_bytes:
                    break
                digest.update(chunk)
                with disk_errors("write a blob"):
                    await loop.run_in_executor(None, write_all, file, chunk)
            if size != size_bytes or digest.hexdigest() != sha256:
                raise ChecksumMismatch(f"{size} bytes arrived that are not blob {sha256[:12]} of {size_bytes} bytes")
            with disk_errors("write a blob"):
                await loop.run_in_executor(None, sync_file, file)
                folder = self._blobs.folder_of(sha256)
                file.close()
                os.replace(path, folder / sha256)
                sync_folder(folder)
        finally:
            file.close()
            path.unlink(missing_ok=True)
        with self._lock:
            self._wanted.pop(sha256, None)
        logger.warning("blob %s is whole again: a client had a copy", sha256[:12])

    def forget(self, names: Iterable[str]) -> None:
        """Blobs that no manifest names any more are not wanted."""
        with self._lock:
            for sha256 in names:
                self._wanted.pop(sha256, None)
