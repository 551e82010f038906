"""Durable state of a device: its identity, and the trained update that the server has not acknowledged.

One JSON file, replaced durably at every transition:

    idle -> training -> trained -> uploading -> idle
                ^___________________ after a restart the round begins again, with the next attempt number

A second file, the ledger, gets a line per round.
"""

from __future__ import annotations

import logging
import re
import secrets
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgefed.disk import FolderLock, disk_errors, make_folder, make_private, settle_file, write_durably
from edgefed.errors import EdgefedError, MalformedMessage, StateCorrupt
from edgefed.protocol.messages import UpdateMeta, decode_message, encode_message
from edgefed.protocol.signing import new_key

logger = logging.getLogger("edgefed.agent")

FORMAT_VERSION = 1
JOURNAL_FILE = "journal.json"
LOCK_FILE = "agent.lock"
UPDATES_FOLDER, RESIDUALS_FOLDER = "updates", "residuals"
Phase = Literal["idle", "training", "trained", "uploading"]
_IDENTITY = re.compile(r"[0-9a-f]{32}")
_DEVICE_KEY = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class JournalRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Content of journal.json. ``device_key``: private key that signs requests (`protocol.signing`).

    ``server_round`` and ``attempt`` belong to the last work that was begun. They stay after it has ended, so that a
    later attempt gets a new number. ``update`` and ``update_file`` are set while an update waits for its
    acknowledgement. ``residuals``: file of what acknowledged updates have left out (`edgefed.agent.compression`), and
    ``new_residuals`` with the pending one. ``round_bytes_down`` and ``round_seconds`` keep the cost of that round for
    the ledger.
    """

    format_version: int
    client_id: str
    client_key: str
    device_key: str = ""
    server: str = ""
    run_id: str = ""
    server_round: int = 0
    attempt: int = 0
    phase: Phase = "idle"
    update_file: str = ""
    update: UpdateMeta | None = None
    residuals: str = ""
    new_residuals: str = ""
    round_bytes_down: int = 0
    round_seconds: dict[str, float] = {}
    rounds_acknowledged: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


class Journal:
    """The open journal of one state folder; keeps the folder locked until `close`.

    Raises StateLocked if another process uses the folder, StateCorrupt if journal.json is not a journal, StorageError
    or DiskFull if it cannot be written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = make_private(Path(folder))
        self.updates = make_folder(self.folder / UPDATES_FOLDER)
        self._residuals = make_folder(self.folder / RESIDUALS_FOLDER)
        self._path = self.folder / JOURNAL_FILE
        self._lock = FolderLock(self.folder, LOCK_FILE)
        try:
            self.record = self._load()
            self._drop_strays()
        except EdgefedError:
            self._lock.release()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock of the folder."""
        self._lock.release()

    @property
    def pending(self) -> UpdateMeta | None:
        """The update that waits for its acknowledgement."""
        return self.record.update

    @property
    def pending_path(self) -> Path:
        """File of the pending update."""
        return self.updates / self.record.update_file

    def knows(self, server: str) -> bool:
        """Whether this device has joined that server before."""
        return self.record.server == server and self.record.run_id != ""

    def rounds_done(self) -> int:
        """Number of rounds of this run for which the ledger has an accepted update, also of earlier processes."""
        path = self.folder / LEDGER_FILE
        if not path.exists():
            return 0
        with disk_errors(path):
            lines = path.read_bytes().splitlines()
        entries = [msgspec.json.decode(line, type=LedgerEntry) for line in lines if line.endswith(b"}")]
        of_run = [entry for entry in entries if entry.run_id == self.record.run_id and entry.outcome == "accepted"]
        return len({entry.server_round for entry in of_run})

    def renew_identity(self) -> None:
        """Draw a new identity. The server and work of the old one are dropped."""
        self._forget(**_new_identity(), server="", run_id="", server_round=0, attempt=0, residuals="")

    def bind(self, server: str, run_id: str) -> None:
        """Record the run that the device takes part in. Drops work for another server or run; keeps the identity."""
        record = self.record
        if (record.server, record.run_id) == (server, run_id):
            return
        if record.phase != "idle":
            logger.warning(
                "dropping the %s update of round %d: it belongs to run %s at %s, this is run %s at %s",
                record.phase, record.server_round, record.run_id, record.server, run_id, server,
            )  # fmt: skip
        self._forget(server=server, run_id=run_id, server_round=0, attempt=0, residuals="")

    def begin_training(self, server_round: int) -> int:
        """Record that work on a round begins. Returns its attempt number: 1, or the next one of this round."""
        attempt = self.record.attempt + 1 if self.record.server_round == server_round else 1
        self._forget(server_round=server_round, attempt=attempt, phase="training")
        return attempt

    def update_path(self) -> Path:
        """File that the trainer writes the update of the current round to."""
        return self.updates / f"round-{self.record.server_round}-attempt-{self.record.attempt}.safetensors"

    @property
    def residuals_path(self) -> Path | None:
        """File of the residuals that acknowledged updates have left; None if there are none."""
        path = self._residuals / (self.record.residuals or "none")
        return path if path.exists() else None

    def new_residuals_path(self) -> Path:
        """File for the residuals that the update of the current round leaves."""
        name = self.update_path().name
        return self._residuals / (name if name != self.record.residuals else f"again-{name}")

    def finish_training(self, path: Path, meta: UpdateMeta, *, bytes_down: int, seconds: dict[str, float]) -> None:
        """Record the finished update at ``path``, durably: from now on no crash loses it."""
        settle_file(path)
        new_residuals = self.new_residuals_path()
        if new_residuals.exists():
            settle_file(new_residuals)
        self._change(
            phase="trained", update_file=path.name, update=meta, round_bytes_down=bytes_down, round_seconds=seconds,
            new_residuals=new_residuals.name if new_residuals.exists() else "",
        )  # fmt: skip

    def begin_upload(self) -> None:
        """Record that the upload begins."""
        if self.record.phase != "uploading":
            self._change(phase="uploading")

    def begin_next_attempt(self) -> None:
        """Give the pending update a new attempt number: the server cannot use what it has under the old one."""
        assert self.record.update is not None, "no pending update"
        attempt = self.record.attempt + 1
        update = msgspec.structs.replace(self.record.update, attempt=attempt)
        self._change(phase="trained", attempt=attempt, update=update)

    def drop_pending(self) -> None:
        """Delete the pending update without an acknowledgement."""
        self._forget()

    def acknowledge(self, *, bytes_down: int, bytes_up: int) -> None:
        """Delete the acknowledged update, keep its residuals, and add the round's bytes to the totals."""
        record = self.record
        self._forget(
            residuals=record.new_residuals or record.residuals,
            rounds_acknowledged=record.rounds_acknowledged + 1,
            bytes_down=record.bytes_down + bytes_down,
            bytes_up=record.bytes_up + bytes_up,
        )

    def _forget(self, **changes: Any) -> None:
        cleared: dict[str, Any] = {"phase": "idle", "update_file": "", "update": None, "new_residuals": ""}
        cleared |= {"round_bytes_down": 0, "round_seconds": {}}
        # The journal first: an update without an entry is only a stray file, an entry without its update is a loss.
        self._change(**(cleared | changes))
        self._drop_strays()

    def _change(self, **changes: Any) -> None:
        record = msgspec.structs.replace(self.record, **changes)
        write_durably(self._path, encode_message(record))
        self.record = record

    def _drop_strays(self) -> None:
        record = self.record
        for folder, names in (
            (self.updates, [record.update_file]),
            (self._residuals, [record.residuals, record.new_residuals]),
        ):
            with disk_errors(folder):
                for file in list(folder.iterdir()):
                    if file.name not in names:
                        file.unlink()

    def _load(self) -> JournalRecord:
        with disk_errors(self._path):
            data = self._path.read_bytes() if self._path.exists() else None
        if data is None:
            record = msgspec.convert({"format_version": FORMAT_VERSION, **_new_identity()}, JournalRecord)
            write_durably(self._path, encode_message(record))
            return record
        try:
            record = decode_message(data, JournalRecord)
        except MalformedMessage as error:
            raise self._corrupt(str(error)) from error
        if record.format_version != FORMAT_VERSION:
            raise self._corrupt(f"format {record.format_version}, this edgefed reads format {FORMAT_VERSION}")
        if not _IDENTITY.fullmatch(record.client_id) or not record.client_key:
            raise self._corrupt("invalid client_id, or an empty client_key")
        if not record.device_key:  # of an earlier version
            record = msgspec.structs.replace(record, device_key=new_key())
            write_durably(self._path, encode_message(record))
        elif not _DEVICE_KEY.fullmatch(record.device_key):
            raise self._corrupt("invalid device_key")
        if (record.phase in ("trained", "uploading")) != (record.update is not None):
            raise self._corrupt(f"phase {record.phase} with {'an' if record.update else 'no'} update")
        if record.update is not None and not _FILE_NAME.fullmatch(record.update_file):
            raise self._corrupt(f"invalid file name in update_file: {record.update_file!r}")
        for name in filter(None, (record.residuals, record.new_residuals)):
            if not _FILE_NAME.fullmatch(name):
                raise self._corrupt(f"invalid file name of residuals: {name!r}")
        return record

    def _corrupt(self, found: str) -> StateCorrupt:
        return StateCorrupt(
            f"invalid journal {self._path}: {found}",
            remedy="Restore it from a copy, or delete the state folder; the device then joins as a new client.",
        )


def read_journal(folder: Path) -> JournalRecord:
    """The record of a state folder, also while an agent uses it. Raises StateCorrupt, StorageError."""
    path = folder / JOURNAL_FILE
    with disk_errors(path):
        data = path.read_bytes()
    try:
        return decode_message(data, JournalRecord)
    except MalformedMessage as error:
        raise StateCorrupt(f"invalid journal {path}: {error}") from error


def _new_identity() -> dict[str, str]:
    """A random client_id, client_key and device_key."""
    return {"client_id": uuid.uuid4().hex, "client_key": secrets.token_hex(32), "device_key": new_key()}


# --- ledger.jsonl: one line per round, with its cost and its result ---------------------------------------------

LEDGER_FILE = "ledger.jsonl"


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One round of one device. ``outcome``: "accepted", or the code of the error that ended it.

    ``experts_resident`` and ``experts_changed`` count (layer, expert) pairs over all layers; an expert
    has changed if at least one optimizer step updated it. ``resumed``: the update was trained before a restart; then
    ``bytes_up`` leaves out what the earlier process sent.
    """

    ended_at: str
    run_id: str
    server_round: int
    attempt: int
    outcome: str
    resumed: bool
    bytes_down: int
    bytes_up: int
    seconds: dict[str, float]
    experts_resident: int
    experts_changed: int
    metrics: dict[str, float]


def utc_now() -> str:
    """Current time in ISO 8601, with seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017  datetime.UTC needs Python 3.11


def append_entry(path: Path, entry: LedgerEntry) -> None:
    """Append one line. A line that a crash cut short is ended first, so that it does not spoil the new one."""
    with disk_errors(path), path.open("a+b") as file:
        if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(msgspec.json.encode(entry) + b"\n")


def last_entry(path: Path) -> LedgerEntry | None:
    """The last line of a ledger; None if there is none, or a crash has cut it short."""
    with disk_errors(path):
        lines = path.read_bytes().splitlines() if path.exists() else []
    try:
        return msgspec.json.decode(lines[-1], type=LedgerEntry) if lines else None
    except msgspec.DecodeError:
        return None
