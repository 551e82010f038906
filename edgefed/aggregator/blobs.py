"""Content-addressed files, ``blobs/ab/<sha256>``, and the catalog of those that clients may download.

The name is the hash of the content, so a blob never changes. A blob is written to a temporary file and hashed while it
is written, synced, renamed, and its folder synced; only then may anything refer to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from edgefed.aggregator.store import Store
from edgefed.aggregator.validate import max_update_bytes
from edgefed.disk import READ_BYTES, disk_errors, sync_file, sync_folder, write_all
from edgefed.errors import NotFound, StateCorrupt
from edgefed.protocol.changes import encode_blob_change
from edgefed.protocol.messages import Manifest, encode_message

logger = logging.getLogger(__name__)

BATCH_FILES = 64
"""Files that are synced together, which costs the file system one journal commit instead of 64. While one batch is
synced, the next is written, so up to twice as many are open."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(name: str) -> bool:
    """Whether ``name`` is a SHA-256 in lower-case hexadecimal; no other name reaches the file system."""
    return _SHA256.fullmatch(name) is not None


class BlobStore:
    """The blob folder of one state folder. Thread-safe; the lock of the store excludes other processes."""

    def __init__(self, state_folder: Path):
        self.root = state_folder / "blobs"
        self._temporary = self.root / "tmp"
        self._names = itertools.count()
        with disk_errors(f"make {self.root}"):
            self._temporary.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """File of a blob, whether or not it exists. Raises ValueError unless ``sha256`` is a SHA-256."""
        if not is_sha256(sha256):
            raise ValueError(f"invalid SHA-256: {sha256[:80]!r}")
        return self.root / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Whether the blob exists."""
        return self.path(sha256).is_file()

    def put(self, chunks: Iterable[bytes | memoryview]) -> tuple[str, int]:
        """Write one blob durably. Returns (sha256, size_bytes). Raises DiskFull, StorageError."""
        with self.batch() as batch:
            return batch.put(chunks)

    def put_file(self, source: Path) -> tuple[str, int]:
        """Copy a file into the store, durably. Returns (sha256, size_bytes)."""
        with disk_errors(f"read {source}"), source.open("rb") as file:
            return self.put(iter(lambda: file.read(READ_BYTES), b""))

    def batch(self) -> BlobBatch:
        """Context manager for many blobs that are synced together. They are durable when it ends."""
        return BlobBatch(self)

    def delete(self, names: Iterable[str]) -> int:
        """Delete blobs by SHA-256; ignores missing ones. Returns how many were deleted."""
        deleted = 0
        for sha256 in names:
            try:
                self.path(sha256).unlink()
                deleted += 1
            except FileNotFoundError:
                pass
            except OSError as error:  # Windows: a client reads it; the next start deletes it
                logger.warning("blob %s cannot be deleted yet: %s", sha256, error)
        return deleted

    def delete_unreferenced(self, referenced: Iterable[str]) -> int:
        """Delete temporary files and every blob that is not in ``referenced``. Returns how many blobs were deleted."""
        keep = set(referenced)
        for path in self._temporary.iterdir():
            path.unlink(missing_ok=True)
        found = (path.name for path in self.root.glob("[0-9a-f][0-9a-f]/*"))
        return self.delete([name for name in found if is_sha256(name) and name not in keep])

    def open_temporary(self) -> tuple[Path, BinaryIO]:
        """Open a new unbuffered temporary file."""
        path = self._temporary / f"{os.getpid()}-{next(self._names)}"
        return path, path.open("xb", buffering=0)

    def folder_of(self, sha256: str) -> Path:
        """The folder of a blob; created durably for the first blob in it."""
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
    """Writes many blobs, from several threads. Leaving the context publishes them; an exception discards the rest.

    Full batches are synced in the background. An error there is raised by the next `put` that fills one, or by `flush`.
    """

    def __init__(self, blobs: BlobStore):
        self._blobs = blobs
        self._lock = threading.Lock()
        self._pending: list[_Pending] = []
        self._syncing: Future[None] | None = None
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="edgefed-sync")

    def __enter__(self) -> BlobBatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._syncer.shutdown()
            self._discard(self._pending)

    def put(self, chunks: Iterable[bytes | memoryview]) -> tuple[str, int]:
        """Write one blob. Returns (sha256, size_bytes). It is durable after `flush`."""
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
            if len(self._pending) >= BATCH_FILES:
                self._start_flush()
        return pending.sha256, size

    def flush(self) -> None:
        """Sync and rename all blobs that were written so far."""
        with self._lock:
            self._start_flush()
            self._await_flush()

    def _start_flush(self) -> None:
        """Hand what is pending to the background, after the batch before it. The caller has the lock."""
        self._await_flush()
        ready, self._pending = self._pending, []
        self._syncing = self._syncer.submit(self._publish, ready)

    def _await_flush(self) -> None:
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def _publish(self, ready: Sequence[_Pending]) -> None:
        try:
            with disk_errors("write a blob"):
                folders = set()
                for pending in ready:
                    sync_file(pending.file)
                    pending.file.close()  # Windows renames only closed files
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


class ChangeCache:
    """Changes between blobs, found once for all devices that ask. Thread-safe.

    ``find`` returns path and size of a blob, or raises NotFound. Those used last stay in memory, up to ``limit_bytes``.
    """

    def __init__(self, find: Callable[[str], tuple[Path, int]], limit_bytes: int = 64 * 1024 * 1024):
        self._find, self._limit_bytes, self._size_bytes = find, limit_bytes, 0
        self._found: dict[tuple[str, str], bytes | None] = {}
        self._lock = threading.Lock()

    def between(self, base: str, sha256: str) -> bytes | None:
        """What makes a blob of ``base``; None if that saves too little, or if ``base`` is not there any more."""
        key = base, sha256
        with self._lock:
            if key in self._found:
                self._found[key] = change = self._found.pop(key)  # now the last one used
                return change
        try:
            change = encode_blob_change(self._find(base)[0], self._find(sha256)[0])
        except (NotFound, FileNotFoundError):
            return None
        with self._lock:
            if key not in self._found:
                self._found[key] = change
                self._size_bytes += _cost(change)
            while self._size_bytes > self._limit_bytes:
                self._size_bytes -= _cost(self._found.pop(next(iter(self._found))))
        return change


def _cost(change: bytes | None) -> int:
    """Bytes that a change takes in a cache, with its key."""
    return 512 + len(change or b"")


class Catalog:
    """The global model as it can be downloaded now: the manifest of the open round, and the blobs of all stored rounds.

    Reads the store once a round and memory otherwise. The owner calls `load` under its own lock.
    """

    manifest: Manifest
    """Manifest of the open round; after the last round, of the final model."""
    limit_bytes: int
    """Largest size of an update to this model."""

    def __init__(self, store: Store, blobs: BlobStore):
        self._store, self._blobs = store, blobs
        self.load(store.current_round().server_round)

    def load(self, server_round: int) -> None:
        """Switch to a round. Raises StateCorrupt if the store lacks its manifest."""
        manifest = self._store.manifest(server_round)
        if manifest is None or not manifest.units:
            raise StateCorrupt(f"the manifest of round {server_round} is missing")
        self.manifest, self._encoded = manifest, encode_message(manifest)
        self.limit_bytes = max_update_bytes(manifest.units)
        self.load_references()

    def load_references(self) -> None:
        """Read the blobs of all stored manifests from the store."""
        self._referenced = self._store.referenced(moments=False)

    @property
    def referenced(self) -> dict[str, int]:
        """{sha256: size} of the blobs that may be downloaded."""
        return dict(self._referenced)

    def check_files(self) -> dict[str, int]:
        """{sha256: size} of the blobs that are missing or have another size; deletes blobs that nothing names.

        Raises StateCorrupt if none is there.
        """
        bad = {}
        for sha256, size_bytes in self._referenced.items():
            path = self._blobs.path(sha256)
            if not path.is_file() or path.stat().st_size != size_bytes:
                bad[sha256] = size_bytes
        if len(bad) == len(self._referenced):
            raise StateCorrupt(f"the {len(bad)} blobs of the run are missing in {self._blobs.root}")
        self._blobs.delete_unreferenced(self._store.referenced())
        return bad

    def name_of(self, sha256: str) -> str:
        """What a blob is in the newest model: the key of a unit or the name of a file; its hash if it is older."""
        units = (unit.key for unit in self.manifest.units if unit.sha256 == sha256)
        files = (file.name for file in self.manifest.files if file.sha256 == sha256)
        return next(units, next(files, sha256))

    def encoded_manifest(self, server_round: int) -> bytes:
        """A round's manifest as sent to clients. Raises NotFound if it is not stored."""
        if server_round == self.manifest.server_round:
            return self._encoded
        manifest = self._store.manifest(server_round)
        if manifest is None:
            raise NotFound(f"the manifest of round {server_round} is not stored")
        return encode_message(manifest)

    def blob(self, sha256: str) -> tuple[Path, int]:
        """Path and size of a blob of a stored manifest. Raises NotFound for any other name."""
        size_bytes = self._referenced.get(sha256) if is_sha256(sha256) else None
        if size_bytes is None:
            raise NotFound(f"no stored manifest contains blob {sha256[:64]!r}")
        return self._blobs.path(sha256), size_bytes
