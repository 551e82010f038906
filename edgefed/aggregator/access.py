"""Who may take part: invitations, the keys of devices, and the clients that are banned.

    state folder/  access.db  token

``token`` has the owner's token of a server that admits by invitation only. access.db is a database of its own, so that
`edgefed invite` and `edgefed clients` can change it while the server runs: the server sees that another process has
written (SQLite's ``data_version``) and reads it again. It is small and kept in memory.

An invitation is ``ID.SECRET``; only the SHA-256 of the secret is stored. It admits ``uses`` devices until it expires or
is revoked. A device that is admitted has its public key here, and from then on each of its requests must be signed
with it (`edgefed.protocol.signing`). A signature counts once, within `WINDOW_S` of the server's clock, and not from
before the start of the server, which forgets what it has seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgefed.aggregator.store import check_run, sqlite_errors, transaction
from edgefed.aggregator.validate import digest
from edgefed.disk import disk_errors, write_durably
from edgefed.errors import ConfigError, StaleRequest, Unauthorized
from edgefed.protocol.signing import Signature, is_genuine

DATABASE_NAME, TOKEN_FILE = "access.db", "token"
WINDOW_S = 120.0
"""How far the time of a request may be from the server's clock."""
MAX_NONCES = 200_000
"""Signatures that are remembered; further requests have to wait."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS invitations (
    id TEXT PRIMARY KEY, secret_sha256 TEXT NOT NULL, label TEXT NOT NULL, uses INTEGER NOT NULL,
    used INTEGER NOT NULL DEFAULT 0, created_at REAL NOT NULL, expires_at REAL, revoked INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS devices (
    client_id TEXT PRIMARY KEY, public_key TEXT NOT NULL, invitation TEXT NOT NULL, added_at REAL NOT NULL,
    banned INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS removals (client_id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclasses.dataclass(frozen=True)
class Invitation:
    """Times in seconds since the epoch; ``expires_at`` None: never."""

    id: str
    secret_sha256: str
    label: str
    uses: int
    used: int
    created_at: float
    expires_at: float | None
    revoked: bool

    def problem(self, now: float) -> str:
        """Why it admits nobody; empty if it does."""
        if self.revoked:
            return "revoked"
        if self.expires_at is not None and now > self.expires_at:
            return "expired"
        return "used up" if self.used >= self.uses else ""


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that was admitted, or only banned (``public_key`` ""). ``invitation``: id, or "" for the token."""

    client_id: str
    public_key: str
    invitation: str
    added_at: float
    banned: bool


@dataclasses.dataclass(frozen=True)
class Credentials:
    """What a request has shown. ``public_key``: it is signed with this key; ``invitation``: id of a valid one."""

    token: bool = False
    public_key: str = ""
    invitation: str = ""


OWNER = Credentials(token=True)
"""Credentials of a request on a server without a token."""


class Access:
    """The open access database of a state folder. Thread-safe."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time):
        """Open it, or make it. Raises StorageError, StateCorrupt."""
        self._path, self._clock, self._lock = folder / DATABASE_NAME, clock, threading.RLock()
        with disk_errors(f"make {self._path}"):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        with sqlite_errors(self._path):
            self._connection = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(SCHEMA)
        self._version: int | None = None
        self._started = clock()
        self._nonces: dict[tuple[str, str], float] = {}
        self._load()

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def _transaction(self, *, reload: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction, on disk when it ends; with ``reload``, what it wrote is then in memory."""
        with self._lock, sqlite_errors(self._path):
            with transaction(self._connection):
                yield self._connection
            if reload:
                self._load()

    def _load(self) -> None:
        with self._lock, sqlite_errors(self._path):
            rows = self._connection.execute("SELECT * FROM invitations").fetchall()
            self.invitations = {row[0]: Invitation(*_with_flag(row)) for row in rows}
            rows = self._connection.execute("SELECT * FROM devices").fetchall()
            self.devices = {row[0]: Device(*_with_flag(row)) for row in rows}
            self._by_key = {device.public_key: device for device in self.devices.values() if device.public_key}
            self.removals = [row[0] for row in self._connection.execute("SELECT client_id FROM removals")]

    def refresh(self) -> bool:
        """Read the database again if another process has changed it. Returns whether it has."""
        with self._lock, sqlite_errors(self._path):
            version = self._connection.execute("PRAGMA data_version").fetchone()[0]
            changed: bool
            changed, self._version = version != self._version, version
            if changed:
                self._load()
            return changed

    # --- invitations --------------------------------------------------------------------------------------------

    def invite(self, *, uses: int = 1, expires_s: float | None = None, label: str = "") -> tuple[Invitation, str]:
        """Make an invitation. Returns it, and the text ``ID.SECRET``, which is stored nowhere."""
        number, secret, now = secrets.token_hex(4), secrets.token_urlsafe(24), self._clock()
        expires_at = None if expires_s is None else now + expires_s
        with self._transaction() as connection:
            row = (number, digest(secret), label, uses, now, expires_at)
            connection.execute(
                "INSERT INTO invitations (id, secret_sha256, label, uses, created_at, expires_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                row,
            )
        return self.invitations[number], f"{number}.{secret}"

    def revoke(self, number: str) -> Invitation:
        """Make an invitation useless; devices that it has admitted stay. Raises ConfigError for an unknown one."""
        if number not in self.invitations:
            raise ConfigError(
                f"unknown invitation {number!r}", remedy="`edgefed invite --list` shows the invitations of a run."
            )
        with self._transaction() as connection:
            connection.execute("UPDATE invitations SET revoked = 1 WHERE id = ?", (number,))
        return self.invitations[number]

    def check_invitation(self, text: str) -> str:
        """The id of a valid invitation ``ID.SECRET``. Raises Unauthorized."""
        number, _, secret = text.partition(".")
        if number not in self.invitations:
            self._load()  # it may be from a moment ago
        invitation = self.invitations.get(number)
        if invitation is None or not hmac.compare_digest(invitation.secret_sha256, digest(secret)):
            raise Unauthorized("unknown invitation", remedy="Ask for a new join link (`edgefed invite`).")
        if problem := invitation.problem(self._clock()):
            raise Unauthorized(f"this invitation is {problem}", remedy="Ask for a new join link (`edgefed invite`).")
        return number

    # --- devices ------------------------------------------------------------------------------------------------

    def key_of(self, client_id: str) -> str:
        """The public key that the requests of a client must be signed with; "" if it has none."""
        device = self.devices.get(client_id)
        return "" if device is None else device.public_key

    def device_of(self, public_key: str) -> Device | None:
        """The device with this key."""
        return self._by_key.get(public_key)

    def is_banned(self, client_id: str) -> bool:
        """Whether a client is banned."""
        device = self.devices.get(client_id)
        return device is not None and device.banned

    def check_banned(self, client_id: str) -> None:
        """Raise Unauthorized for a banned client."""
        if self.is_banned(client_id):
            raise Unauthorized(f"client {client_id!r} is banned from this run", remedy="Ask who runs the server.")

    def admit(self, client_id: str, credentials: Credentials, *, known: bool, invite_only: bool) -> None:
        """Admit a client that registers; its key is stored before this returns. Repeating it is harmless.

        ``known``: it registered earlier, with its client key. Raises Unauthorized.
        """
        self.check_banned(client_id)
        key = credentials.public_key
        other = self._by_key.get(key) if key else None
        if other is not None and other.client_id != client_id:
            raise Unauthorized(f"this device's key belongs to client {other.client_id!r}")
        expected = self.key_of(client_id)
        if expected:
            if expected != key:
                raise Unauthorized(f"requests of client {client_id!r} must be signed with its device's key")
            return
        if not known and not credentials.invitation and (invite_only or not credentials.token):
            raise Unauthorized(
                "this device needs an invitation to join", remedy="Ask for a join link (`edgefed invite`)."
            )
        if not key:
            if not credentials.token:
                raise Unauthorized("a device that joins by invitation must sign its requests")
            return
        device = Device(client_id, key, credentials.invitation, self._clock(), banned=False)
        with self._transaction(reload=bool(credentials.invitation)) as connection:
            if not known and credentials.invitation:
                used = connection.execute(
                    "UPDATE invitations SET used = used + 1 WHERE id = ? AND used < uses AND NOT revoked",
                    (credentials.invitation,),
                )
                if not used.rowcount:
                    raise Unauthorized("this invitation is used up", remedy="Ask for a new join link.")
            connection.execute(
                "INSERT INTO devices VALUES (?, ?, ?, ?, ?) ON CONFLICT (client_id) DO UPDATE SET "
                "public_key = excluded.public_key, added_at = excluded.added_at",  # a ban that was lifted left a row
                dataclasses.astuple(device),
            )
        with self._lock:
            self.devices[client_id] = self._by_key[key] = device

    def ban(self, client_id: str, banned: bool = True) -> None:
        """Ban a client, or lift the ban."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO devices (client_id, public_key, invitation, added_at) VALUES (?, '', '', ?) "
                "ON CONFLICT DO NOTHING",
                (client_id, self._clock()),
            )
            connection.execute("UPDATE devices SET banned = ? WHERE client_id = ?", (banned, client_id))

    def remove(self, client_id: str) -> None:
        """Forget a client's key, and ask the server to forget the client."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM devices WHERE client_id = ?", (client_id,))
            connection.execute("INSERT OR IGNORE INTO removals VALUES (?)", (client_id,))

    def note_removed(self, client_id: str) -> None:
        """The server has forgotten a client."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM removals WHERE client_id = ?", (client_id,))

    # --- signatures ---------------------------------------------------------------------------------------------

    @property
    def time_ms(self) -> int:
        """The server's clock."""
        return round(1000 * self._clock())

    def check_signature(self, signature: Signature, run_id: str, method: str, target: str) -> None:
        """Check one request, once. Raises Unauthorized (not signed by that key), StaleRequest (its time, or replayed).

        Only what is genuine is remembered, so a stranger cannot fill the memory.
        """
        if not is_genuine(signature, run_id, method, target):
            raise Unauthorized("the signature of this request is wrong")
        now, at = self._clock(), signature.milliseconds / 1000
        if abs(now - at) > WINDOW_S or at < self._started:
            raise StaleRequest(
                f"the request says that it was made {now - at:+.1f} s ago; its device's clock may differ"
            )
        name = (signature.public_key, signature.nonce)
        with self._lock:
            if len(self._nonces) >= MAX_NONCES:
                self._nonces = {seen: when for seen, when in self._nonces.items() if now - when <= WINDOW_S}
            if name in self._nonces or len(self._nonces) >= MAX_NONCES:
                raise StaleRequest("this request was received before")
            self._nonces[name] = at

    # --- facts --------------------------------------------------------------------------------------------------

    def save_address(self, url: str) -> None:
        """Note the address that clients join with, for `edgefed invite`."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO facts VALUES ('address', ?)", (url,))

    def address(self) -> str:
        """The address that the server had last; "" before its first start."""
        with self._lock, sqlite_errors(self._path):
            rows = self._connection.execute("SELECT value FROM facts WHERE name = 'address'").fetchall()
        return rows[0][0] if rows else ""


def _with_flag(row: Sequence[Any]) -> list[Any]:
    """A row whose last column is true or false."""
    return [*row[:-1], bool(row[-1])]


def owner_token(folder: Path) -> str:
    """The token of the run's owner, for status and models; made at the first call. Raises StorageError."""
    path = folder / TOKEN_FILE
    if not path.exists():
        write_durably(path, secrets.token_urlsafe().encode() + b"\n")
    with disk_errors(path):
        return path.read_text(encoding="ascii").strip()


@contextlib.contextmanager
def open_access(folder: Path) -> Iterator[Access]:
    """The access database of a run, also beside its server. Raises StorageError without a run in ``folder``."""
    check_run(folder)
    access = Access(folder)
    try:
        yield access
    finally:
        access.close()
