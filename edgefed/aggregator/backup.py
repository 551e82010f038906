"""A copy of a run's folder that is complete in itself, taken while its server runs or not.

The databases are copied with SQLite's backup, which takes one moment of each. Then come the blobs and updates that the
copied database names; they never change, only disappear when their round is over. If one has disappeared meanwhile, the
database is copied again. Every file is checked against its SHA-256. Unfinished uploads are left out: their clients send
them again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path

from edgefed.aggregator import access
from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.store import DATABASE_NAME, Store, check_run, sqlite_errors
from edgefed.aggregator.tls import CERTIFICATE_FILE, KEY_FILE
from edgefed.disk import disk_errors, make_folder, make_private, settle_file, sync_folder
from edgefed.errors import ConfigError, StateCorrupt
from edgefed.protocol.routes import CHUNK_BYTES

TRIES = 5
"""Databases that are copied before it counts as damage that files disappear: a round would have ended in each copy."""


@dataclasses.dataclass(frozen=True)
class Backup:
    """What was copied: the round that was in progress, and the files with their size."""

    server_round: int
    files: int
    size_bytes: int


def back_up(folder: Path, target: Path) -> Backup:
    """Copy the run in ``folder`` to ``target``, which must not exist or be empty. Nothing is left after a failure.

    Raises ConfigError (``target`` has files), StateCorrupt (a file is damaged or missing), DiskFull, StorageError.
    """
    check_run(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty", remedy="Name a new folder for each backup.")
    make_folder(target.absolute().parent)
    with disk_errors(f"write {target}"):
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.absolute().parent))
        try:
            found = _copy_run(folder, partial)
            make_private(partial)
            sync_folder(partial)
            os.replace(partial, target)  # over an empty folder, too
            sync_folder(target.absolute().parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return found


def _copy_run(folder: Path, target: Path) -> Backup:
    problem = ""
    for _ in range(TRIES):
        for name in (DATABASE_NAME, access.DATABASE_NAME):
            _copy_database(folder / name, target / name)
        for name in (access.TOKEN_FILE, CERTIFICATE_FILE, KEY_FILE):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(folder / name, target / name)
        try:
            return _copy_files(folder, target)
        except FileNotFoundError as error:
            problem = str(error.filename)
    raise StateCorrupt(f"the run in {folder} has lost {problem}")


def _copy_database(source: Path, target: Path) -> None:
    """One moment of a database, as a file of its own."""
    if not source.is_file():
        return
    target.unlink(missing_ok=True)
    with (
        sqlite_errors(source),
        contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as reader,
        contextlib.closing(sqlite3.connect(target)) as writer,
    ):
        reader.backup(writer)
        writer.execute("PRAGMA journal_mode=DELETE")  # no second file beside it
    settle_file(target)


def _copy_files(folder: Path, target: Path) -> Backup:
    """The blobs and updates of the copied database. Raises FileNotFoundError if one has disappeared meanwhile."""
    source, copy = BlobStore(folder), BlobStore(target)
    store = Store(target, read_only=True)
    try:
        current = store.current_round()
        wanted = {source.path(sha256): (copy.path(sha256), sha256) for sha256 in store.referenced()}
        for update in store.pending_updates():
            place = Path("updates") / update.file_name
            wanted[folder / place] = target / place, update.sha256
    finally:
        store.close()
    size_bytes = 0
    for path, (to, sha256) in wanted.items():
        to.parent.mkdir(exist_ok=True)
        size_bytes += to.stat().st_size if to.is_file() else _copy_checked(path, to, sha256)
    for parent in {to.parent for to, _ in wanted.values()}:
        sync_folder(parent)
    return Backup(current.server_round, len(wanted), size_bytes)


def _copy_checked(path: Path, target: Path, sha256: str) -> int:
    """Copy a file durably under its name; return its size. Raises StateCorrupt if its content is not what it was."""
    found, size_bytes, partial = hashlib.sha256(), 0, target.with_name(f"{target.name}.tmp")
    with path.open("rb") as source, partial.open("wb") as copy:
        while chunk := source.read(4 * CHUNK_BYTES):
            found.update(chunk)
            copy.write(chunk)
            size_bytes += len(chunk)
    if found.hexdigest() != sha256:
        raise StateCorrupt(f"{path} is damaged: its SHA-256 is {found.hexdigest()[:12]}, expected {sha256[:12]}")
    settle_file(partial)
    os.replace(partial, target)
    return size_bytes
