"""The durable state of the aggregator: one SQLite file of metadata beside the blobs.

    state folder/  lock  edgefed.db  blobs/ab/<sha256>  uploads/<client>-<round>-<attempt>.part  updates/...

Everything is stored before it is acknowledged. WAL with ``synchronous=FULL``: a transaction that has returned survives
a power cut. A file is written before the row that names it, so a row never names a missing file; a file without a row
is an orphan that the next start deletes. A manifest is stored as differences: ``units`` has a row for each unit *that
changed* in a round, and the unit of round r is its newest row with ``server_round <= r``.

One connection, guarded by a lock; every method may be called from any thread.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgefed.aggregator.coverage import no_coverage
from edgefed.aggregator.records import MOMENTS, ClientRecord, RoundRecord, UpdateRecord
from edgefed.aggregator.rounds import Phase, RoundPolicy
from edgefed.disk import FolderLock
from edgefed.errors import DiskFull, StateCorrupt, StorageError
from edgefed.protocol.coverage import ExpertCoverage
from edgefed.protocol.messages import FileInfo, Manifest, RoundStatus, RunConfig, UnitInfo, UpdateMeta

DATABASE_NAME = "edgefed.db"
LOCK_NAME = "lock"
APPLICATION_ID = 0x45444746  # "EDGF", in the header of the file: whose database this is
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE run (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE units (
    key TEXT, server_round INTEGER, position INTEGER NOT NULL, sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    info BLOB NOT NULL, PRIMARY KEY (key, server_round)) WITHOUT ROWID;
CREATE TABLE clients (client_id TEXT PRIMARY KEY, joined INTEGER NOT NULL, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE rounds (
    server_round INTEGER PRIMARY KEY, phase TEXT NOT NULL, participants TEXT NOT NULL, opened_at REAL,
    status BLOB);
CREATE TABLE updates (
    server_round INTEGER, client_id TEXT, attempt INTEGER NOT NULL, sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    accepted_at REAL NOT NULL, meta BLOB, PRIMARY KEY (server_round, client_id)) WITHOUT ROWID;
"""
_UPDATES = "SELECT server_round, client_id, attempt, sha256, size_bytes, meta FROM updates"

T = TypeVar("T")


def has_run(folder: Path) -> bool:
    """Whether ``folder`` has a run; an unfinished import does not count."""
    return (folder / DATABASE_NAME).is_file()


def check_run(folder: Path) -> None:
    """Raise StorageError unless ``folder`` has a run."""
    if not has_run(folder):
        raise StorageError(
            f"no run in state folder {folder}",
            remedy="Create a run with `edgefed serve`, or set `state` to the folder of a run.",
        )


def write_database(
    path: Path,
    run: RunConfig,
    policy: RoundPolicy,
    units: Sequence[UnitInfo],
    files: Sequence[FileInfo],
    experts_per_layer: Sequence[int],
) -> None:
    """Write the database of a new run, complete and closed, to ``path``. The caller renames it into place."""
    with contextlib.closing(sqlite3.connect(path)) as connection, sqlite_errors(path), connection:
        connection.executescript(
            f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION}; PRAGMA synchronous=FULL;"
            + SCHEMA
        )
        facts = {"config": run, "policy": policy, "files": files, "experts_per_layer": experts_per_layer}
        connection.executemany(
            "INSERT INTO run VALUES (?, ?)", [(name, msgspec.json.encode(value)) for name, value in facts.items()]
        )
        connection.executemany("INSERT INTO units VALUES (?, ?, ?, ?, ?, ?)", _unit_rows(units, 1, range(len(units))))
        connection.execute("INSERT INTO rounds VALUES (1, ?, '[]', NULL, NULL)", (Phase.WAITING.value,))


def _unit_rows(units: Sequence[UnitInfo], server_round: int, positions: Iterable[int]) -> list[tuple[Any, ...]]:
    return [
        (unit.key, server_round, position, unit.sha256, unit.size_bytes, msgspec.json.encode(unit))
        for unit, position in zip(units, positions, strict=True)
    ]


@contextlib.contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into edgefed errors: full disk, foreign or damaged file, anything else."""
    try:
        yield
    except sqlite3.OperationalError as error:
        kind = DiskFull if "full" in str(error) else StorageError
        raise kind(f"cannot use {path}: {error}") from error
    except (sqlite3.DatabaseError, msgspec.DecodeError) as error:
        raise StateCorrupt(f"invalid or damaged database {path}: {error}") from error


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the block as one transaction, on disk when it ends; an error undoes it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


class Store:
    """The open state of a run. `close` releases it, and so does the end of the process."""

    def __init__(self, folder: Path, *, read_only: bool = False):
        """Open the run in ``folder``. Raises StorageError (no run), StateLocked, StateCorrupt.

        ``read_only`` takes no lock, so it works beside a server; it reads the state of that moment.
        """
        self.folder = folder
        self._path = folder / DATABASE_NAME
        check_run(folder)
        self._folder_lock = None if read_only else FolderLock(folder, LOCK_NAME)
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        with sqlite_errors(self._path):
            mode = "rw" if self._folder_lock else "ro"
            self._connection = sqlite3.connect(
                f"{self._path.absolute().as_uri()}?mode={mode}", uri=True, check_same_thread=False, isolation_level=None
            )
            for pragma, expected in (("application_id", APPLICATION_ID), ("user_version", SCHEMA_VERSION)):
                found = self._connection.execute(f"PRAGMA {pragma}").fetchone()[0]
                if found != expected:
                    raise StateCorrupt(
                        f"{self._path} is not an edgefed database of this version: {pragma} {found}, not {expected}"
                    )
            verdict = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise StateCorrupt(f"{self._path} is damaged: {verdict}")
            if self._folder_lock:
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute("PRAGMA synchronous=FULL")
            self.run = self._fact("config", RunConfig)
            self.policy = self._fact("policy", RoundPolicy)
            self.files = self._fact("files", tuple[FileInfo, ...])
            self.experts_per_layer = self._fact("experts_per_layer", tuple[int, ...])
            self._positions = {
                key: at for key, at in self._connection.execute("SELECT DISTINCT key, position FROM units")
            }

    def _fact(self, name: str, kind: type[T]) -> T:
        rows = self._query("SELECT value FROM run WHERE name = ?", name)
        if not rows:
            raise StateCorrupt(f"{self._path} has no {name} of the run")
        return _decode(rows[0][0], kind)

    def close(self) -> None:
        """Close the database and release the folder."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._folder_lock:
                self._folder_lock.release()

    def _query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock, sqlite_errors(self._path):
            if self._connection is None:
                raise StorageError(f"{self._path} is closed")
            return self._connection.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction, on disk when it ends."""
        with self._lock, sqlite_errors(self._path):
            if self._connection is None:
                raise StorageError(f"{self._path} is closed")
            with transaction(self._connection):
                yield self._connection

    # --- the global model ---------------------------------------------------------------------------------------

    def manifest(self, server_round: int) -> Manifest | None:
        """The model at the start of a round; None if that round is not stored or not reached."""
        with self._lock:
            stored = range(self.oldest_round(), self.current_round().server_round + 1)
            if server_round not in stored and server_round != self._number("kept_round", -1):
                return None
            units = tuple(unit for unit in self._units(server_round) if not unit.key.startswith(MOMENTS))
        return Manifest(
            run_id=self.run.run_id, server_round=server_round, experts_per_layer=self.experts_per_layer, units=units,
            files=self.files,
        )  # fmt: skip

    def moments(self, server_round: int) -> dict[str, UnitInfo]:
        """The moments of the server optimizer at the start of a round, by their key; no damage is looked for."""
        units = self._units(server_round)
        return {unit.key: unit for unit in units if unit.key.startswith(MOMENTS) and unit.sha256}

    def _units(self, server_round: int) -> list[UnitInfo]:
        rows = self._query(
            "SELECT info FROM units AS u WHERE server_round = (SELECT MAX(server_round) FROM units "
            "WHERE key = u.key AND server_round <= ?) ORDER BY position",
            server_round,
        )
        return [_decode(row[0], UnitInfo) for row in rows]

    def last_changed(self) -> dict[str, int]:
        """Unit key -> the round that its current value comes from; 1 for units as imported."""
        return dict(self._query("SELECT key, MAX(server_round) FROM units GROUP BY key"))

    def oldest_round(self) -> int:
        """The oldest round with a stored manifest."""
        return self._number("oldest_round", 1)

    def _number(self, name: str, default: int) -> int:
        rows = self._query("SELECT value FROM run WHERE name = ?", name)
        return int(rows[0][0]) if rows else default

    def referenced(self, *, moments: bool = True) -> dict[str, int]:
        """SHA-256 -> size of every blob of a stored manifest, and of the moments of the server optimizer."""
        unless = "" if moments else f" AND key NOT GLOB '{MOMENTS}*'"
        found = dict(self._query(f"SELECT sha256, size_bytes FROM units WHERE sha256 != ''{unless}"))
        found.update({file.sha256: file.size_bytes for file in self.files})
        return found

    def prune(self, keep_rounds: int, best: int | None = None) -> list[str]:
        """Delete all but the newest ``keep_rounds`` manifests (0: none) and the ``best``. Returns blobs left over."""
        oldest = self.current_round().server_round - keep_rounds + 1
        if keep_rounds <= 0 or oldest <= self.oldest_round():
            return []
        with self._transaction() as connection:
            before = {row[0] for row in connection.execute("SELECT sha256 FROM units WHERE sha256 != ''")}
            connection.execute(
                "DELETE FROM units WHERE server_round < (SELECT MAX(server_round) FROM units AS newer "
                "WHERE newer.key = units.key AND newer.server_round <= ?) AND server_round != COALESCE((SELECT "
                "MAX(server_round) FROM units AS best WHERE best.key = units.key AND best.server_round <= ?), 0)",
                (oldest, best or 0),
            )
            facts = [("kept_round", str(best or -1)), ("oldest_round", str(oldest))]
            connection.executemany("INSERT OR REPLACE INTO run VALUES (?, ?)", facts)
        return sorted(before - self.referenced().keys())

    def save_policy(self, policy: RoundPolicy) -> None:
        """Replace the policy of the run."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO run VALUES ('policy', ?)", (msgspec.json.encode(policy),))
        self.policy = policy

    # --- clients ------------------------------------------------------------------------------------------------

    def clients(self) -> list[ClientRecord]:
        """All clients that have ever registered, by id."""
        with sqlite_errors(self._path):
            rows = self._query("SELECT record FROM clients ORDER BY client_id")
            return [_decode(row[0], ClientRecord) for row in rows]

    def save_clients(self, clients: Iterable[ClientRecord]) -> None:
        """Store clients, new ones and changed ones."""
        with self._transaction() as connection:
            _save_clients(connection, clients)

    def delete_clients(self, client_ids: Iterable[str]) -> None:
        """Forget clients; what they contributed to the model stays."""
        with self._transaction() as connection:
            connection.executemany("DELETE FROM clients WHERE client_id = ?", [(each,) for each in client_ids])

    # --- rounds and updates -------------------------------------------------------------------------------------

    def current_round(self) -> RoundRecord:
        """The newest round. After the last one its phase is FINISHED."""
        columns = "server_round, phase, participants, opened_at"
        rows = self._query(f"SELECT {columns} FROM rounds ORDER BY server_round DESC LIMIT 1")
        if not rows:
            raise StateCorrupt(f"{self._path} contains no round")
        number, phase, participants, opened_at = rows[0]
        return RoundRecord(number, Phase(phase), tuple(json.loads(participants)), opened_at)

    def save_round(self, server_round: int, phase: Phase, participants: Iterable[str]) -> None:
        """Record the phase of a round. The first time that it trains is its opening."""
        opened_at = time.time() if phase is Phase.TRAINING else None
        with self._transaction() as connection:
            connection.execute(
                "UPDATE rounds SET phase = ?, participants = ?, opened_at = COALESCE(opened_at, ?) "
                "WHERE server_round = ?",
                (phase.value, json.dumps(sorted(participants)), opened_at, server_round),
            )

    def history(self) -> tuple[RoundStatus, ...]:
        """The folded rounds, oldest first."""
        rows = self._query("SELECT status FROM rounds WHERE status IS NOT NULL ORDER BY server_round")
        return tuple(_decode(row[0], RoundStatus) for row in rows)

    def pending_updates(self) -> list[UpdateRecord]:
        """Acknowledged updates that no round has counted yet, sorted by client and round."""
        rows = self._query(f"{_UPDATES} WHERE meta IS NOT NULL ORDER BY client_id, server_round")
        return [_update(row) for row in rows]

    def participants(self, server_round: int) -> frozenset[str]:
        """The clients that were to train in a round."""
        rows = self._query("SELECT participants FROM rounds WHERE server_round = ?", server_round)
        return frozenset(json.loads(rows[0][0])) if rows else frozenset()

    def find_update(self, server_round: int, client_id: str) -> UpdateRecord | None:
        """The acknowledged update of a client for a round, also of a finished one."""
        rows = self._query(f"{_UPDATES} WHERE server_round = ? AND client_id = ?", server_round, client_id)
        return _update(rows[0]) if rows else None

    def most_updates(self) -> int:
        """The largest number of updates that were accepted of one client."""
        rows = self._query("SELECT COUNT(*) FROM updates GROUP BY client_id ORDER BY 1 DESC LIMIT 1")
        return int(rows[0][0]) if rows else 0

    def record_update(self, update: UpdateRecord, client: ClientRecord) -> None:
        """Record an update whose file is durable. After this it may be acknowledged."""
        with self._transaction() as connection:
            row = (update.server_round, update.client_id, update.attempt, update.sha256, update.size_bytes, time.time())
            connection.execute("INSERT INTO updates VALUES (?,?,?,?,?,?,?)", (*row, msgspec.json.encode(update.meta)))
            _save_clients(connection, [client])

    def coverage(self) -> ExpertCoverage:
        """How the experts are covered, up to the last folded round."""
        rows = self._query("SELECT value FROM run WHERE name = 'coverage'")
        with sqlite_errors(self._path):
            return _decode(rows[0][0], ExpertCoverage) if rows else no_coverage(self.experts_per_layer)

    def record_fold(
        self,
        status: RoundStatus,
        changed: Sequence[UnitInfo],
        next_phase: Phase,
        clients: Iterable[ClientRecord],
        coverage: ExpertCoverage,
        folded: Iterable[UpdateRecord],
    ) -> None:
        """Close a round and begin the next with ``changed`` units, whose blobs are durable. One transaction.

        ``folded``: updates that the round has counted or set aside.
        """
        following = status.server_round + 1
        with self._transaction() as connection:
            positions = [self._positions.setdefault(unit.key, len(self._positions)) for unit in changed]
            rows = _unit_rows(changed, following, positions)
            connection.executemany("INSERT INTO units VALUES (?, ?, ?, ?, ?, ?)", rows)
            connection.execute(
                "UPDATE rounds SET phase = 'done', status = ? WHERE server_round = ?",
                (msgspec.json.encode(status), status.server_round),
            )
            connection.execute("INSERT INTO rounds VALUES (?, ?, '[]', NULL, NULL)", (following, next_phase.value))
            connection.executemany(
                "UPDATE updates SET meta = NULL WHERE server_round = ? AND client_id = ?",
                [(update.server_round, update.client_id) for update in folded],
            )
            connection.execute("INSERT OR REPLACE INTO run VALUES ('coverage', ?)", (msgspec.json.encode(coverage),))
            _save_clients(connection, clients)


def _decode(data: bytes, kind: type[T]) -> T:
    """Decode a column. Raises StateCorrupt."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StateCorrupt(f"damaged database {DATABASE_NAME}: {error}") from error


def _save_clients(connection: sqlite3.Connection, clients: Iterable[ClientRecord]) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO clients VALUES (?, ?, ?)",
        [(client.client_id, client.joined, msgspec.json.encode(client)) for client in clients],
    )


def _update(row: tuple[Any, ...]) -> UpdateRecord:
    server_round, client_id, attempt, sha256, size_bytes, meta = row
    decoded = None if meta is None else _decode(meta, UpdateMeta)
    return UpdateRecord(server_round, client_id, attempt, sha256, size_bytes, decoded)
