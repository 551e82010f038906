"""ledger.jsonl: one line per round, what it cost and what it brought."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import msgspec

from edgefed.disk import disk_errors

LEDGER_FILE = "ledger.jsonl"


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One round of one device. ``outcome``: "accepted", or the code of the error that ended it.

    ``experts_held`` and ``experts_changed`` count (layer, expert) pairs, over all layers; an expert has changed when at
    least one optimiser step touched it. ``resumed``: the update was trained before a restart; bytes that an earlier
    process sent are not in ``bytes_up``.
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
    experts_held: int
    experts_changed: int
    metrics: dict[str, float]


def utc_now() -> str:
    """ISO 8601 with seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017  datetime.UTC needs Python 3.11


def append_entry(path: Path, entry: LedgerEntry) -> None:
    """Append one line. A line that a crash cut short is closed first, so that it spoils only itself."""
    with disk_errors(path), path.open("a+b") as file:
        if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(msgspec.json.encode(entry) + b"\n")
