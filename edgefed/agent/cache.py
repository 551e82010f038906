"""Downloaded units of the global model, each in a file named by its SHA-256.

An expert that did not change between two rounds has the same hash, so a device downloads only what is new to it. A blob
is verified once, when it arrives; later uses check its size only. A download in progress is a `.part` file, which
survives an interruption. A slice of a unit is a file of its own, cut from the whole blob where that is here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias

from edgefed.disk import READ_BYTES, disk_errors, make_folder, sync_file
from edgefed.errors import DiskFull, MalformedMessage
from edgefed.protocol.changes import apply_blob_change
from edgefed.protocol.messages import FileInfo, UnitInfo
from edgefed.protocol.slices import SliceFile, UnitSlice

logger = logging.getLogger("edgefed.agent")

Item: TypeAlias = UnitInfo | FileInfo | UnitSlice
OnBytes = Callable[[int], None]
"""Called with the number of bytes that have just moved."""

PART_SUFFIX = ".part"
PARALLEL_DOWNLOADS = 4
"""On loopback, 2 shared cores: 400 blobs of 100 kB take 1.5-2.0 s with one thread, 0.7-1.3 s with 4, no less with 8;
blobs of 64 MB gain nothing. Over a network each small blob costs a round trip, so overlapping pays more."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BlobSource(Protocol):
    """What the cache needs of a transport."""

    def download(
        self, sha256: str, size_bytes: int, path: Path, on_bytes: OnBytes | None = None, base: Path | None = None
    ) -> None:
        """Store the blob at ``path``, verified; continue from ``path``.part. ``base``: an earlier version of it."""
        ...

    def download_slice(self, item: UnitSlice, path: Path, on_bytes: OnBytes | None = None) -> None:
        """The same for some neurons of a unit."""
        ...


class BlobCache:
    """The blobs of one state folder. One user at a time: the journal has the folder's lock."""

    def __init__(self, folder: Path, source: BlobSource, *, parallel: int = PARALLEL_DOWNLOADS) -> None:
        self.folder = make_folder(folder)
        self._source = source
        self._parallel = parallel
        self._versions: dict[str, str] = {}
        """The newest version that this process has of each unit, {key: sha256}; it may be pruned meanwhile."""

    def path(self, sha256: str) -> Path:
        """File of a blob, whether or not it is there."""
        return self.folder / sha256

    def missing(self, items: Iterable[Item]) -> dict[str, int]:
        """Blobs of ``items`` that are not in the cache: {sha256: size_bytes}. Deletes a blob that has the wrong size.

        Raises MalformedMessage for an invalid hash, or for one hash with two sizes.
        """
        wanted: dict[str, int] = {}
        for item in items:
            check_sha256(item.sha256, item.size_bytes)
            if wanted.setdefault(item.sha256, item.size_bytes) != item.size_bytes:
                raise MalformedMessage(f"blob {item.sha256[:12]} is listed with two sizes")
        missing = {}
        for sha256, size in wanted.items():
            found = _size_of(self.path(sha256))
            if found == size:
                continue
            if found is not None:
                with disk_errors(self.path(sha256)):
                    self.path(sha256).unlink()
            missing[sha256] = size
        return missing

    def bytes_to_download(self, items: Iterable[Item]) -> int:
        """Bytes that `ensure` would download; partial downloads count as done, and slices of blobs that are here."""
        items = tuple(items)
        self._cut_slices(items)
        return sum(size - self._left_behind(sha256, size) for sha256, size in self.missing(items).items())

    def ensure(self, items: Iterable[Item], on_bytes: OnBytes | None = None) -> dict[str, Path]:
        """Download missing ``items`` and return {sha256: file} of all.

        Raises DiskFull before the first byte if the disk has too little room, and any error of a download. Complete
        and partial downloads stay, and the next call continues from them. ``on_bytes`` is called from several threads.
        """
        items = tuple(items)
        self._cut_slices(items)
        missing = self.missing(items)
        self._check_room(missing)
        slices = {item.sha256: item for item in items if isinstance(item, UnitSlice)}
        units = [item for item in items if isinstance(item, UnitInfo)]
        bases = {unit.sha256: self.path(self._versions[unit.key]) for unit in units if unit.key in self._versions}
        self._download_all(missing, slices, bases, on_bytes)
        self._versions |= {unit.key: unit.sha256 for unit in units}
        return {item.sha256: self.path(item.sha256) for item in items}

    def prune(self, keep: Iterable[str]) -> int:
        """Delete every blob and partial download whose hash is not in ``keep``. Returns the bytes freed."""
        keep, freed = set(keep), 0
        with disk_errors(self.folder):
            for file in list(self.folder.iterdir()):
                if file.name.removesuffix(PART_SUFFIX) not in keep:
                    freed += file.stat().st_size
                    file.unlink()
        return freed

    def _cut_slices(self, items: Iterable[Item]) -> None:
        """Make slices from whole blobs that are in the cache."""
        for item in items:
            if not isinstance(item, UnitSlice) or self.path(item.sha256).exists():
                continue
            check_sha256(item.unit.sha256, item.unit.size_bytes)
            whole = self.path(item.unit.sha256)
            if _size_of(whole) != item.unit.size_bytes:
                continue
            part = PartFile(self.path(item.sha256), item.size_bytes)
            with SliceFile(whole, item.rows) as file, part.opened():
                part.truncate()
                while chunk := file.read(READ_BYTES):
                    part.append(chunk)
            part.publish()

    def _left_behind(self, sha256: str, size_bytes: int) -> int:
        path = self.path(sha256)
        return min(_size_of(path.with_name(path.name + PART_SUFFIX)) or 0, size_bytes)

    def _check_room(self, missing: Mapping[str, int]) -> None:
        need = sum(size - self._left_behind(sha256, size) for sha256, size in missing.items())
        with disk_errors(self.folder):
            free = shutil.disk_usage(self.folder).free
        if need > free:
            raise DiskFull(f"the parts of the model to download need {need} bytes in {self.folder}, {free} are free")

    def _download_all(
        self,
        missing: Mapping[str, int],
        slices: Mapping[str, UnitSlice],
        bases: Mapping[str, Path],
        on_bytes: OnBytes | None,
    ) -> None:
        """Uses daemon threads and a queue: the threads of an executor would delay the exit after Ctrl-C."""
        todo: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        for entry in missing.items():
            todo.put(entry)
        errors: list[BaseException] = []

        def work() -> None:
            while not errors:
                try:
                    sha256, size = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    if sha256 in slices:
                        self._source.download_slice(slices[sha256], self.path(sha256), on_bytes)
                    else:
                        base = bases.get(sha256)
                        base = base if base is not None and base.exists() else None
                        self._source.download(sha256, size, self.path(sha256), on_bytes, base)
                except BaseException as error:  # raised again in the caller's thread
                    errors.append(error)

        threads = [
            threading.Thread(target=work, name="edgefed-download", daemon=True)
            for _ in range(min(self._parallel, len(missing)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def check_sha256(sha256: str, size_bytes: int) -> None:
    """Raise MalformedMessage unless ``sha256`` is a SHA-256: it came from outside and becomes a file name."""
    if not _SHA256.fullmatch(sha256):
        raise MalformedMessage(f"invalid SHA-256: expected 64 lower-case hex digits, found {sha256[:80]!r}")
    if size_bytes < 0:
        raise MalformedMessage(f"blob {sha256[:12]} has a size of {size_bytes} bytes")


class PartFile:
    """A partial download of the blob at ``path``: ``offset`` of ``size_bytes`` bytes have arrived.

    Use: ``with part.opened(): part.append(...)``, then compare `sha256`, then `publish` or `discard`. Never writes more
    than ``size_bytes``.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.part = path.with_name(path.name + PART_SUFFIX)
        self.size_bytes = size_bytes
        self.offset = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._overflowed = False

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open for appending and hash the existing bytes; flush to the disk at the end, also after an error."""
        with disk_errors(self.part):
            self._file = file = open(self.part, "a+b")  # noqa: SIM115  closed below, outlives this block
        self._digest, self.offset, self._overflowed = hashlib.sha256(), 0, False
        try:
            with disk_errors(self.part):
                file.seek(0)
                while chunk := file.read(READ_BYTES):
                    self._digest.update(chunk)
                    self.offset += len(chunk)
            if self.offset > self.size_bytes:
                self.truncate()
            yield
        finally:
            with disk_errors(self.part):
                try:
                    sync_file(file)
                finally:
                    file.close()

    def append(self, chunk: bytes) -> bool:
        """Write a chunk. Returns False and writes nothing if it would exceed ``size_bytes``."""
        if self.offset + len(chunk) > self.size_bytes:
            self._overflowed = True
            return False
        assert self._file is not None, "append() belongs inside opened()"
        with disk_errors(self.part):
            self._file.write(chunk)
        self._digest.update(chunk)
        self.offset += len(chunk)
        return True

    def append_change(self, base: Path, chunks: Iterable[bytes]) -> None:
        """Write what the change in ``chunks`` makes of the blob at ``base``, instead of a download of it all."""
        change = bytearray()
        for chunk in chunks:
            change += chunk
            if len(change) > self.size_bytes:  # the server promises less than half
                self._overflowed = True
                return
        with disk_errors(f"read {base}"):
            try:
                self.append(apply_blob_change(base, bytes(change)))
            except MalformedMessage as error:  # the base is damaged: the hash will not match
                logger.warning("%s is downloaded whole: %s", self.path.name[:12], error)

    def truncate(self) -> None:
        """Start again from the first byte."""
        assert self._file is not None, "truncate() belongs inside opened()"
        with disk_errors(self.part):
            self._file.truncate(0)  # append mode: the next write goes to the new end
        self._digest, self.offset = hashlib.sha256(), 0

    def sha256(self) -> str:
        """Hash of the bytes that arrived; "" unless they have the announced size."""
        return self._digest.hexdigest() if self.offset == self.size_bytes and not self._overflowed else ""

    def publish(self) -> None:
        """Rename to the final name. The data is already on the disk; a lost rename costs only another download."""
        with disk_errors(self.path):
            os.replace(self.part, self.path)

    def discard(self) -> None:
        """Delete the partial download."""
        with disk_errors(self.part):
            self.part.unlink(missing_ok=True)


def _size_of(path: Path) -> int | None:
    """Size of a file; None if it does not exist."""
    with disk_errors(path):
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None
