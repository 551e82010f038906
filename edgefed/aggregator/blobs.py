"""Content-addressed files: ``blobs/ab/<sha256>``. A name is a promise of its content, so a blob never changes.

A blob is written to a temporary file and hashed on the way, synced, renamed, and its folder synced; only then may
anything refer to it. Knows nothing of rounds, units or SQLite.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from edgefed.disk import READ_BYTES, disk_errors, sync_file, sync_folder

logger = logging.getLogger(__name__)

BATCH_FILES = 64
"""Files that a batch keeps open before it syncs them together: the journal is then forced out once, not 64 times."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(name: str) -> bool:
    """Whether ``name`` is a SHA-256 in lower-case hexadecimal: the only names that reach the file system."""
    return _SHA256.fullmatch(name) is not None


class BlobStore:
    """The blob folder of one state folder. Thread-safe; one process at a time (the store's lock sees to that)."""

    def __init__(self, state_folder: Path):
        self.root = state_folder / "blobs"
        self._temporary = self.root / "tmp"
        self._names = itertools.count()
        with disk_errors(f"make {self.root}"):
            self._temporary.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be. Raises ValueError on anything but 64 lower-case hexadecimal digits."""
        if not is_sha256(sha256):
            raise ValueError(f"not a SHA-256 in lower-case hexadecimal: {sha256[:80]!r}")
        return self.root / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def put(self, chunks: Iterable[bytes | memoryview]) -> tuple[str, int]:
        """Write one blob durably. Returns (sha256, size_bytes). Raises DiskFull, StorageError."""
        with self.batch() as batch:
            return batch.put(chunks)

    def put_file(self, source: Path) -> tuple[str, int]:
        """Copy a file in durably. Returns (sha256, size_bytes)."""
        with disk_errors(f"read {source}"), source.open("rb") as file:
            return self.put(iter(lambda: file.read(READ_BYTES), b""))

    def batch(self) -> BlobBatch:
        """A context in which many blobs are written and synced together. What it wrote is durable when it ends."""
        return BlobBatch(self)

    def delete(self, names: Iterable[str]) -> int:
        """Delete blobs by SHA-256; a missing one is none. Returns how many went."""
        deleted = 0
        for sha256 in names:
            try:
                self.path(sha256).unlink()
                deleted += 1
            except FileNotFoundError:
                pass
            except OSError as error:  # Windows: a client is just reading it; the next start deletes it
                logger.warning("blob %s stays for now: %s", sha256, error)
        return deleted

    def delete_unreferenced(self, referenced: Iterable[str]) -> int:
        """Delete temporary files and every blob that is not in ``referenced``. Returns how many blobs went."""
        keep = set(referenced)
        for path in self._temporary.iterdir():
            path.unlink(missing_ok=True)
        found = (path.name for path in self.root.glob("[0-9a-f][0-9a-f]/*"))
        return self.delete([name for name in found if is_sha256(name) and name not in keep])

    def open_temporary(self) -> tuple[Path, BinaryIO]:
        """A new temporary file of this process, unbuffered."""
        path = self._temporary / f"{os.getpid()}-{next(self._names)}"
        return path, path.open("xb", buffering=0)

    def folder_of(self, sha256: str) -> Path:
        """The folder of a blob, made durably when it is the first one in it."""
        folder = self.path(sha256).parent
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            sync_folder(self.root)
        return folder


@dataclasses.dataclass
class _Pending:
    sha256: str
    path: Path
    file: BinaryIO


class BlobBatch:
    """Writes many blobs. Usable from several threads; leaving the context publishes, an exception discards the rest."""

    def __init__(self, blobs: BlobStore):
        self._blobs = blobs
        self._lock = threading.Lock()
        self._pending: list[_Pending] = []

    def __enter__(self) -> BlobBatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
        else:
            self._discard(self._pending)

    def put(self, chunks: Iterable[bytes | memoryview]) -> tuple[str, int]:
        """Write one blob. Returns (sha256, size_bytes). It may be referred to once the batch was flushed."""
        with disk_errors("write a blob"):
            path, file = self._blobs.open_temporary()
        digest, size = hashlib.sha256(), 0
        try:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                with disk_errors("write a blob"):
                    write_all(file, chunk)
        except BaseException:
            self._discard([_Pending("", path, file)])
            raise
        pending = _Pending(digest.hexdigest(), path, file)
        with self._lock:
            if any(other.sha256 == pending.sha256 for other in self._pending) or self._blobs.has(pending.sha256):
                self._discard([pending])
            else:
                self._pending.append(pending)
            full = len(self._pending) >= BATCH_FILES
        if full:
            self.flush()
        return pending.sha256, size

    def flush(self) -> None:
        """Sync and rename all that was written so far."""
        with self._lock:
            ready, self._pending = self._pending, []
            try:
                with disk_errors("write a blob"):
                    folders = set()
                    for pending in ready:
                        sync_file(pending.file)
                        pending.file.close()  # Windows renames closed files only
                        folder = self._blobs.folder_of(pending.sha256)
                        os.replace(pending.path, folder / pending.sha256)
                        folders.add(folder)
                    for folder in folders:
                        sync_folder(folder)
            except BaseException:
                self._discard(ready)
                raise

    @staticmethod
    def _discard(entries: Iterable[_Pending]) -> None:
        for pending in entries:
            pending.file.close()
            pending.path.unlink(missing_ok=True)


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write every byte to an unbuffered file: a raw write may stop half-way, and does so just before a disk is full."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
