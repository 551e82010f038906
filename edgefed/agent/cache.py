"""Downloaded parts of the global model, each in a file named by its SHA-256.

Experts that did not change between rounds have the same hash, so a device downloads only what is new to it. A blob is
verified once, when it arrives; afterwards its size is checked on every use.
"""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from edgefed.agent.download import PART_SUFFIX, check_sha256
from edgefed.agent.transport import OnBytes
from edgefed.disk import disk_errors, make_folder
from edgefed.errors import DiskFull, MalformedMessage
from edgefed.protocol.messages import FileInfo, UnitInfo

PARALLEL_DOWNLOADS = 4
"""On loopback, 2 shared cores: 400 blobs of 100 kB take 1.5-2.0 s with one thread, 0.7-1.3 s with 4, no less with 8;
blobs of 64 MB gain nothing. Over a network each small blob costs a round trip, so overlapping pays more."""


class BlobSource(Protocol):
    """What the cache needs of a transport."""

    def download(self, sha256: str, size_bytes: int, path: Path, on_bytes: OnBytes | None = None) -> None: ...


class BlobCache:
    """The blobs of one state folder. One user at a time (the journal holds the folder's lock)."""

    def __init__(self, folder: Path, source: BlobSource, *, parallel: int = PARALLEL_DOWNLOADS) -> None:
        self.folder = make_folder(folder)
        self._source = source
        self._parallel = parallel

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def missing(self, items: Iterable[UnitInfo | FileInfo]) -> dict[str, int]:
        """Which of ``items`` are not here yet: {sha256: size_bytes}. Deletes a blob that has the wrong size.

        Raises MalformedMessage for a hash that is none, or one hash with two sizes.
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

    def bytes_to_download(self, items: Iterable[UnitInfo | FileInfo]) -> int:
        """Bytes that `ensure` would move, less what an earlier download left behind."""
        return sum(size - self._left_behind(sha256, size) for sha256, size in self.missing(items).items())

    def ensure(self, items: Iterable[UnitInfo | FileInfo], on_bytes: OnBytes | None = None) -> dict[str, Path]:
        """Return {sha256: file} of all ``items``, downloading what is missing.

        Raises DiskFull before the first byte when the disk cannot take it, and whatever the download raises; what is
        complete by then stays, and the next call goes on from there. ``on_bytes`` is called from several threads.
        """
        items = tuple(items)
        missing = self.missing(items)
        self._check_room(missing)
        self._download_all(missing, on_bytes)
        return {item.sha256: self.path(item.sha256) for item in items}

    def prune(self, keep: Iterable[str]) -> int:
        """Delete every blob and every partial download whose hash is not in ``keep``. Return the bytes freed."""
        keep, freed = set(keep), 0
        with disk_errors(self.folder):
            for file in list(self.folder.iterdir()):
                if file.name.removesuffix(PART_SUFFIX) not in keep:
                    freed += file.stat().st_size
                    file.unlink()
        return freed

    def _left_behind(self, sha256: str, size_bytes: int) -> int:
        path = self.path(sha256)
        return min(_size_of(path.with_name(path.name + PART_SUFFIX)) or 0, size_bytes)

    def _check_room(self, missing: Mapping[str, int]) -> None:
        need = sum(size - self._left_behind(sha256, size) for sha256, size in missing.items())
        with disk_errors(self.folder):
            free = shutil.disk_usage(self.folder).free
        if need > free:
            raise DiskFull(f"the model's parts need {need} more bytes in {self.folder}, {free} are free")

    def _download_all(self, missing: Mapping[str, int], on_bytes: OnBytes | None) -> None:
        """Daemon threads and a queue; not an executor, whose threads would hold up the exit after Ctrl-C."""
        todo: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        for entry in missing.items():
            todo.put(entry)
        faults: list[BaseException] = []

        def work() -> None:
            while not faults:
                try:
                    sha256, size = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    self._source.download(sha256, size, self.path(sha256), on_bytes)
                except BaseException as error:  # raised again in the caller's thread
                    faults.append(error)

        threads = [
            threading.Thread(target=work, name="edgefed-download", daemon=True)
            for _ in range(min(self._parallel, len(missing)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]


def _size_of(path: Path) -> int | None:
    """Size of a file; None when there is none."""
    with disk_errors(path):
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None
