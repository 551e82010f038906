"""The local side of a resumable download: a `.part` file that becomes the blob when its hash is right."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgefed.disk import READ_BYTES, disk_errors, sync_file
from edgefed.errors import MalformedMessage

PART_SUFFIX = ".part"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_sha256(sha256: str, size_bytes: int) -> None:
    """Refuse a hash that is no hash: it came from outside and becomes a file name. Raises MalformedMessage."""
    if not _SHA256.fullmatch(sha256):
        raise MalformedMessage(f"a SHA-256 has 64 lower-case hex digits, found {sha256[:80]!r}")
    if size_bytes < 0:
        raise MalformedMessage(f"blob {sha256[:12]} has a size of {size_bytes} bytes")


class PartFile:
    """What has arrived of the blob at ``path``. ``offset`` bytes are here; never more than ``size_bytes`` are written.

    Use: ``with part.opened(): part.append(...)``, then compare `sha256`, then `publish` or `discard`.
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
        """Open for appending, hash what is there already; flush to the disk at the end, also after an error."""
        with disk_errors(self.part):
            self._file = open(self.part, "a+b")  # noqa: SIM115  closed below, outlives this block
        self._digest, self.offset, self._overflowed = hashlib.sha256(), 0, False
        try:
            with disk_errors(self.part):
                self._file.seek(0)
                while chunk := self._file.read(READ_BYTES):
                    self._digest.update(chunk)
                    self.offset += len(chunk)
            if self.offset > self.size_bytes:
                self.truncate()
            yield
        finally:
            with disk_errors(self.part):
                try:
                    sync_file(self._file)
                finally:
                    self._file.close()

    def append(self, chunk: bytes) -> bool:
        """Write a chunk. False, and nothing is written, when it would exceed ``size_bytes``."""
        if self.offset + len(chunk) > self.size_bytes:
            self._overflowed = True
            return False
        assert self._file is not None, "append() belongs inside opened()"
        with disk_errors(self.part):
            self._file.write(chunk)
        self._digest.update(chunk)
        self.offset += len(chunk)
        return True

    def truncate(self) -> None:
        """Start again from the first byte."""
        assert self._file is not None, "truncate() belongs inside opened()"
        with disk_errors(self.part):
            self._file.truncate(0)  # append mode: the next write goes to the new end
        self._digest, self.offset = hashlib.sha256(), 0

    def sha256(self) -> str:
        """Hash of what arrived; empty when that is not the announced size, which no hash can equal."""
        return self._digest.hexdigest() if self.offset == self.size_bytes and not self._overflowed else ""

    def publish(self) -> None:
        """Rename to the final name. The data is on the disk already; a lost rename only costs another download."""
        with disk_errors(self.path):
            os.replace(self.part, self.path)

    def discard(self) -> None:
        with disk_errors(self.part):
            self.part.unlink(missing_ok=True)
