"""Parts of uploads on disk: one connection at a time appends to a part, and any interruption can be continued.

``uploads/<client>-<round>-<attempt>.part`` grows while bytes arrive; its size is the offset at which the client
continues, so nothing else is stored. ``updates/<client>-<round>-<attempt>.safetensors`` is a complete, verified update.
This module does not know the content of an update, nor who may send one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from edgefed.aggregator.records import UpdateRecord
from edgefed.disk import disk_errors, sync_file, sync_folder, write_all
from edgefed.errors import DiskFull, NotFound, OffsetMismatch, ProtocolError, RoundClosed, UpdateTooLarge

logger = logging.getLogger(__name__)

DISK_RESERVE_BYTES = 8 * 1024 * 1024
"""Free space that uploads leave, for the database and the log."""
_STEM = re.compile(r"(?P<client_id>[A-Za-z0-9_-]{1,64})-(?P<server_round>[0-9]{1,9})-(?P<attempt>[0-9]{1,9})")
_PART_SUFFIX = ".part"


@dataclasses.dataclass(frozen=True)
class UploadName:
    """Name of an upload. ``client_id`` must have been checked: it becomes part of a file name."""

    client_id: str
    server_round: int
    attempt: int

    @classmethod
    def parse(cls, stem: str) -> UploadName | None:
        """The upload with this `stem`; None for any other text."""
        found = _STEM.fullmatch(stem)
        return found and cls(found["client_id"], int(found["server_round"]), int(found["attempt"]))

    @property
    def stem(self) -> str:
        """CLIENT-ROUND-ATTEMPT."""
        return f"{self.client_id}-{self.server_round}-{self.attempt}"

    @property
    def part_name(self) -> str:
        """File name of the part."""
        return self.stem + _PART_SUFFIX


class PartWriter:
    """Appends to one part. Another connection or the end of the round ends it with `stop`."""

    def __init__(self, path: Path, limit_bytes: int):
        self._lock = threading.Lock()
        self._refusal: ProtocolError | None = None
        self._limit_bytes = limit_bytes
        with disk_errors(f"write {path}"):
            self._file = path.open("ab", buffering=0)
            self.offset = os.fstat(self._file.fileno()).st_size

    def write(self, data: bytes) -> None:
        """Append. Raises the error that `stop` was called with, UpdateTooLarge, DiskFull, StorageError."""
        with self._lock:
            if self._refusal is not None:
                raise self._refusal
            if self.offset + len(data) > self._limit_bytes:
                raise UpdateTooLarge(
                    f"the upload has {self.offset + len(data)} bytes or more, all trainable tensors {self._limit_bytes}"
                )
            try:
                with disk_errors("write an upload"):
                    write_all(self._file, data)
            finally:
                self.offset = os.fstat(self._file.fileno()).st_size

    def stop(self, refusal: ProtocolError) -> None:
        """Refuse further writes. When this returns, no write is in progress."""
        with self._lock:
            if self._refusal is None:
                self._refusal = refusal
                self._file.close()


class UploadFolder:
    """Both folders of one state folder."""

    def __init__(self, state_folder: Path):
        self.parts = state_folder / "uploads"
        self.updates = state_folder / "updates"
        self._lock = threading.Lock()
        self._writers: dict[UploadName, PartWriter] = {}
        with disk_errors(f"make {self.parts}"):
            self.parts.mkdir(exist_ok=True)
            self.updates.mkdir(exist_ok=True)

    def offset(self, name: UploadName) -> int:
        """Number of bytes that have arrived."""
        try:
            return (self.parts / name.part_name).stat().st_size
        except FileNotFoundError:
            return 0

    def open(self, name: UploadName, offset: int, limit_bytes: int) -> PartWriter:
        """Continue an upload at ``offset``. Ends a connection that still writes to it, and deletes other attempts.

        Raises OffsetMismatch if ``offset`` is not the number of bytes that have arrived.
        """
        with self._lock:
            self._stop(name, OffsetMismatch("another connection continues this upload"))
            self._delete_parts(lambda other: other.client_id == name.client_id and other != name)
            arrived = self.offset(name)
            if arrived != offset:
                raise OffsetMismatch(f"the upload continues at {arrived}, not at {offset}", offset=arrived)
            writer = self._writers[name] = PartWriter(self.parts / name.part_name, limit_bytes)
            return writer

    def close(self, name: UploadName, writer: PartWriter) -> None:
        """End a connection. The bytes that have arrived stay."""
        with self._lock:
            writer.stop(OffsetMismatch("this connection's upload has ended"))
            if self._writers.get(name) is writer:
                del self._writers[name]

    def seal(self, name: UploadName) -> Path:
        """End any connection and return the part's path. Raises NotFound if nothing has arrived."""
        with self._lock:
            self._stop(name, OffsetMismatch("the upload was committed meanwhile"))
            path = self.parts / name.part_name
            if not path.is_file():
                raise NotFound(f"nothing was uploaded for round {name.server_round}, attempt {name.attempt}")
            return path

    def discard(self, name: UploadName, reason: ProtocolError) -> None:
        """Delete a part that is refused."""
        with self._lock:
            self._stop(name, reason)
            self._delete_parts(lambda other: other == name)

    def check_room(
        self, name: UploadName, offset: int, length: int | None, limit_bytes: int, absent: Callable[[], Collection[str]]
    ) -> None:
        """Check that ``length`` more bytes (None: unknown) fit into an upload of at most ``limit_bytes``, and the disk.

        If the disk is short, the parts of ``absent`` clients are deleted. Raises UpdateTooLarge and deletes the part;
        DiskFull.
        """
        if (whole := offset + (length or 0)) > limit_bytes:
            error = UpdateTooLarge(f"the upload would have {whole} bytes, all trainable tensors have {limit_bytes}")
            self.discard(name, error)
            raise error
        needed_bytes = limit_bytes - offset if length is None else length
        for last_try in (False, True):
            free_bytes = shutil.disk_usage(self.parts).free
            if free_bytes >= needed_bytes + DISK_RESERVE_BYTES:
                return
            if last_try:
                raise DiskFull(
                    f"an upload of {needed_bytes} bytes does not fit: {free_bytes} bytes are free, of which "
                    f"{DISK_RESERVE_BYTES} are reserved"
                )
            freed = self.discard_of(absent(), RoundClosed("the disk is short, and this client was absent"))
            if freed:
                logger.warning("the disk is short: %d bytes of unfinished uploads of absent clients are deleted", freed)

    def discard_of(self, client_ids: Collection[str], reason: ProtocolError) -> int:
        """Delete the parts of these clients and end their connections. Returns the number of bytes."""
        with self._lock:
            for name in [name for name in self._writers if name.client_id in client_ids]:
                self._stop(name, reason)
            return self._delete_parts(lambda name: name.client_id in client_ids)

    def promote(self, name: UploadName, file_name: str) -> Path:
        """Move a verified part to the updates, durably. Raises DiskFull, StorageError; then the part stays."""
        source, target = self.parts / name.part_name, self.updates / file_name
        with disk_errors(f"store update {target.name}"):
            with source.open("rb+") as file:  # Windows syncs only files that are open for writing
                sync_file(file)
            with self._lock:
                os.replace(source, target)
            sync_folder(self.updates)
        return target

    def demote(self, name: UploadName, path: Path) -> None:
        """Undo `promote` after a record that could not be written: the client may commit again."""
        with self._lock, disk_errors(f"move {path} back"):
            os.replace(path, self.parts / name.part_name)

    def end_rounds(self, oldest: int, refusal: ProtocolError) -> None:
        """End the connections and delete the parts of rounds before ``oldest``: they are closed."""
        with self._lock:
            for name in [name for name in self._writers if name.server_round < oldest]:
                self._stop(name, refusal)
            self._delete_parts(lambda name: name.server_round < oldest)

    def delete_updates(self, updates: Iterable[UpdateRecord]) -> None:
        """Delete the files of a folded round."""
        for update in updates:
            (self.updates / update.file_name).unlink(missing_ok=True)

    def recover(self, open_rounds: Collection[int], recorded: Iterable[UpdateRecord]) -> None:
        """Tidy up after a crash. ``open_rounds``: those that take uploads.

        A complete update without a record was never acknowledged. It becomes a part again, so that its client can
        commit it without sending it again. Parts of other rounds are deleted.
        """
        known = {update.file_name for update in recorded}
        with disk_errors("tidy the uploads"):
            for path in self.updates.iterdir():
                if path.name not in known and path.is_file():
                    os.replace(path, self.parts / path.with_suffix(".part").name)
        with self._lock:
            self._delete_parts(lambda name: name.server_round not in open_rounds)

    def _stop(self, name: UploadName, refusal: ProtocolError) -> None:
        writer = self._writers.pop(name, None)
        if writer is not None:
            writer.stop(refusal)

    def _delete_parts(self, wanted: Callable[[UploadName], bool]) -> int:
        deleted_bytes = 0
        for path in self.parts.iterdir():
            name = UploadName.parse(path.stem) if path.suffix == _PART_SUFFIX else None
            if path.is_file() and (name is None or wanted(name)):
                deleted_bytes += path.stat().st_size
                path.unlink(missing_ok=True)
        return deleted_bytes
