"""Files of the state folder: durable writes, hashes, and operating system errors by their edgefed name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from edgefed.errors import DiskFull, StorageError
from edgefed.protocol.frames import sync_file, sync_folder

READ_BYTES = 1024 * 1024
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn OSError of file operations on ``path`` into DiskFull or StorageError. Never wrap sockets in it."""
    try:
        yield
    except OSError as fault:
        if fault.errno in _FULL:
            raise DiskFull(f"no room left on the disk of {path.parent} while writing {path.name}") from fault
        raise StorageError(f"cannot use {path}: {fault.strerror or fault}") from fault


def make_folder(folder: Path) -> Path:
    """Create a folder that only its owner may read, with its parents."""
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``: after a crash it holds the old content or the new one, nothing else."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        temporary.unlink(missing_ok=True)  # a leftover might have another mode
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            sync_file(file)
        os.replace(temporary, path)
        sync_folder(path.parent)


def hash_file(path: Path) -> tuple[str, int]:
    """Return (sha256, size_bytes) of a file."""
    digest, size = hashlib.sha256(), 0
    with disk_errors(path), path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def settle_file(path: Path) -> None:
    """Flush a finished file and its name to the disk."""
    with disk_errors(path):
        with path.open("r+b") as file:
            sync_file(file)
        sync_folder(path.parent)
