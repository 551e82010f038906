"""Durable files: writes that survive a crash, hashes, and errors of the operating system as edgefed errors."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import filelock

from edgefed.errors import DiskFull, StateLocked, StorageError

if sys.platform != "win32":
    import fcntl

READ_BYTES = 1024 * 1024
"""Size of one read in a loop over a file."""
logger = logging.getLogger(__name__)
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a filesystem answers that cannot sync a folder. EIO, EROFS, EBADF and others remain errors."""
CANNOT_COPY = {*CANNOT_SYNC, errno.EXDEV, errno.EPERM, errno.ETXTBSY}
"""What a filesystem answers that cannot copy in the kernel; the bytes are then read and written."""
MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")
"""Types of filesystems whose files are in memory."""
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextlib.contextmanager
def disk_errors(what: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into DiskFull (no space, quota) or StorageError. Not for code that uses sockets.

    ``what`` completes the message "cannot ..."; a path means "use PATH".
    """
    try:
        yield
    except OSError as error:
        action = f"use {what}" if isinstance(what, Path) else what
        detail = error.strerror or str(error)
        if error.filename is not None and str(error.filename) not in action:
            detail += f": {str(error.filename)!r}"
        kind = DiskFull if error.errno in FULL else StorageError
        raise kind(f"cannot {action}: {detail}") from error


def sync_file(file: BinaryIO) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the filesystem can.

    Windows cannot open folders, and some FUSE, SMB, NFS and 9p mounts (WSL) refuse to sync one. The rename itself must
    suffice there; the second case is logged once per process.
    """
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
        _warn_of_unsynced_folders(filesystem(folder) or "unknown filesystem", error.strerror or str(error))
    finally:
        os.close(handle)


@functools.cache
def _warn_of_unsynced_folders(kind: str, reason: str) -> None:
    logger.warning(
        "folders on this disk (%s) cannot be synced (%s): after a power failure the newest files may be missing",
        kind,
        reason,
    )


def make_folder(folder: Path) -> Path:
    """Create a folder that only its owner may read, with its parents."""
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


class FolderLock:
    """A folder that only this process uses, until `release` or the end of the process.

    Locks the file ``name`` in the folder and, except on Windows, the folder itself: somebody may delete the file, which
    Windows forbids while it is locked. Raises StateLocked, StorageError.
    """

    def __init__(self, folder: Path, name: str):
        self._file = filelock.FileLock(str(folder / name), blocking=False, thread_local=False)
        self._handle: int | None = None
        with disk_errors(folder / name):
            try:
                self._file.acquire()
                self._lock_folder(folder)
            except (filelock.Timeout, BlockingIOError) as error:  # OSErrors, so they must be caught inside
                self.release()
                raise StateLocked(f"another edgefed process uses the state folder {folder}") from error

    def _lock_folder(self, folder: Path) -> None:
        if sys.platform == "win32":
            return
        self._handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # NFS, for one, locks files only
            logger.info("%s is locked by its file %s only: %s", folder, self._file.lock_file, error.strerror)

    def release(self) -> None:
        """Let others use the folder. Releasing it twice changes nothing."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        self._file.release()


def check_folder(folder: Path, setting: str = "state") -> None:
    """Raise StorageError unless ``folder`` can be written to, or made. Creates nothing; ``setting`` names it."""
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    if not place.is_dir():
        raise StorageError(
            f"`{setting}={folder}` must be a folder, but {place} is a file", remedy=f"Choose another `{setting}`."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(
            f"`{setting}={folder}`: no permission to write to {place}", remedy=f"Choose another `{setting}`."
        )


def make_private(folder: Path) -> Path:
    """Create a folder that only its owner may read, or make it so; one of another owner stays as it is."""
    make_folder(folder)
    with contextlib.suppress(OSError):
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
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


def settle_file(path: Path) -> None:
    """Flush a finished file and its name to the disk."""
    with disk_errors(path):
        with path.open("r+b") as file:
            sync_file(file)
        sync_folder(path.parent)


def hash_file(path: Path) -> tuple[str, int]:
    """Return (sha256, size_bytes) of a file, read once through a small buffer."""
    digest, size, buffer = hashlib.sha256(), 0, bytearray(READ_BYTES)
    with disk_errors(f"read {path}"), path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return digest.hexdigest(), size


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all bytes to an unbuffered file: a raw write may be partial, for example on a nearly full disk."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@dataclasses.dataclass(frozen=True)
class FileRange:
    """Bytes of a file."""

    path: Path
    start: int
    size_bytes: int


def read_ranges(ranges: Iterable[FileRange]) -> Iterator[memoryview]:
    """Yield the bytes of ranges, one after another, in chunks; each chunk overwrites the one before.

    Raises StorageError if a file cannot be read or is too short.
    """
    buffer = memoryview(bytearray(READ_BYTES))
    for part in ranges:
        with _open_range(part) as file:
            left = part.size_bytes
            while left:
                with disk_errors(f"read {part.path}"):
                    count = file.readinto(buffer[: min(left, READ_BYTES)])
                if not count:
                    raise StorageError(
                        f"{part.path} is too short: {left} of {part.size_bytes} bytes at {part.start} are missing"
                    )
                yield buffer[:count]
                left -= count


def copy_range(part: FileRange, target: BinaryIO) -> None:
    """Append bytes of a file to an unbuffered one, in the kernel where it can. Raises StorageError, OSError."""
    copy, left = getattr(os, "copy_file_range", None), part.size_bytes  # Linux has it
    with _open_range(part) as file:
        try:
            while copy and left and (count := copy(file.fileno(), target.fileno(), left)):
                left -= count
        except OSError as error:
            if error.errno not in CANNOT_COPY:
                raise
    for chunk in read_ranges([FileRange(part.path, part.start + part.size_bytes - left, left)]):
        write_all(target, chunk)


@contextlib.contextmanager
def _open_range(part: FileRange) -> Iterator[io.FileIO]:
    with disk_errors(f"read {part.path}"):
        file = io.FileIO(part.path)
        file.seek(part.start)
    with file:
        yield file


def filesystem(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Type of the filesystem that ``folder`` is on (ext4, tmpfs, overlay), "" where it cannot be found out."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
        place = folder.resolve()
    except OSError:
        return ""
    best, kind = -1, ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mounted = Path(fields[1].replace("\\040", " "))
        if (place == mounted or mounted in place.parents) and len(mounted.parts) >= best:
            best, kind = len(mounted.parts), fields[2]
    return kind


def without_nan(data: object) -> object:
    """``data`` for a JSON document, which has neither NaN nor infinity: they become None."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): without_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [without_nan(value) for value in data]
    return data


def folder_bytes(folder: Path) -> int:
    """Size of the files under a folder in bytes, while others write there; 0 if it does not exist."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            total += path.lstat().st_size if path.is_file() else 0
    return total
