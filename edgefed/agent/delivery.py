"""Delivers the pending update to the server, and deletes it when it is acknowledged, refused or too late.

No other module deletes a trained update.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from edgefed.agent.backoff import Retry
from edgefed.agent.journal import LEDGER_FILE, Journal, LedgerEntry, append_entry, last_entry, utc_now
from edgefed.agent.transport import AggregatorClient
from edgefed.disk import hash_file
from edgefed.errors import (
    ChecksumMismatch,
    EdgefedError,
    IdentityInUse,
    NotFound,
    OffsetMismatch,
    ProtocolError,
    RoundClosed,
    StorageError,
    Unauthorized,
    UnknownClient,
    UpdateConflict,
    VersionMismatch,
)
from edgefed.progress import WatchedProgress
from edgefed.protocol.messages import UpdateMeta
from edgefed.protocol.trainer import TrainedUpdate

logger = logging.getLogger("edgefed.agent")

MAX_REFUSALS = 3
"""Updates refused in a row before the agent ends with the server's error."""
MAX_SENDS = 3
"""How often one update is sent if the server's copy differs from it."""
LONGEST_SETBACK_S = 2.0
"""Longest wait after a dropped round: prevents a tight loop without delaying a slow device further."""

T = TypeVar("T")


class Call(Protocol):
    """Repeats a request until it succeeds (`Agent` binds `Retry.run`)."""

    def __call__(self, request: Callable[[], T], /) -> T:
        """Return the result of ``request()``."""
        ...


@dataclasses.dataclass(frozen=True)
class Delivered:
    """How a round ended. ``error`` is None if the server acknowledged the update; ``metrics`` are the update's."""

    server_round: int
    error: EdgefedError | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Delivery:
    """Delivers pending updates and counts the bytes and refusals of each round, for the ledger."""

    def __init__(
        self, client: AggregatorClient, journal: Journal, retry: Retry, progress: WatchedProgress, call: Call
    ) -> None:
        self._client = client
        self._journal = journal
        self._retry = retry
        self._progress = progress
        self._call = call
        self._refusals = 0
        self._setbacks = 0
        self._resumed = False
        self._start = (0, 0)
        self._acknowledged = 0
        self._left_out: set[str] = set()

    def open_account(self) -> None:
        """Start counting the bytes and seconds of a round."""
        self._start = (self._client.bytes_down, self._client.bytes_up)
        self._progress.take_seconds()
        self._resumed = False

    @property
    def bytes_down(self) -> int:
        """Bytes downloaded in this round."""
        return self._client.bytes_down - self._start[0]

    def describe(self, trained: TrainedUpdate, more: Mapping[str, float], path: Path) -> UpdateMeta:
        """The metadata of the update of the round at ``path``, with ``more`` metrics and the rates of transfers."""
        record = self._journal.record
        metrics = {**trained.metrics, **more, **self._client.rates.metrics()}
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if left_out := metrics.keys() - finite.keys() - self._left_out:
            self._left_out |= left_out
            logger.warning(
                "round %d: metrics that are not finite are not sent: %s",
                *(record.server_round, ", ".join(sorted(left_out))),
            )
        sha256, size_bytes = hash_file(path)
        return UpdateMeta(
            client_id=record.client_id, server_round=record.server_round, attempt=record.attempt, sha256=sha256,
            size_bytes=size_bytes, num_examples=trained.num_examples, num_tokens=trained.num_tokens,
            experts=trained.experts, metrics=finite, survey=trained.survey, lora_rank=trained.lora_rank,
        )  # fmt: skip

    def resume(self) -> Delivered:
        """Deliver the update of an earlier process or connection. Drop it if its file is damaged or missing."""
        meta = self._pending()
        self.open_account()
        self._resumed = True
        if not self._is_intact(meta):
            return self.drop(StorageError(f"the update of round {meta.server_round} is damaged or missing"))
        self._progress.message(f"continuing the upload of round {meta.server_round}")
        return self.deliver()

    def deliver(self) -> Delivered:
        """Upload and commit the pending update, then delete it.

        Raises UnknownClient, Unauthorized, VersionMismatch and IdentityInUse and keeps the update; raises the
        `MAX_REFUSALS`-th other refusal in a row and drops it.
        """
        for send in range(1, MAX_SENDS + 1):
            try:
                return self._send()
            except (RoundClosed, UpdateConflict) as error:
                return self.drop(error)
            except (UnknownClient, Unauthorized, VersionMismatch, IdentityInUse):
                raise  # the update may still count once the device is registered again
            except (ChecksumMismatch, OffsetMismatch, NotFound) as error:
                # The server has other bytes than the file, or none: send it again.
                if send == MAX_SENDS or not self._is_intact(self._pending()):
                    return self.drop(error) if isinstance(error, NotFound) else self.refuse(error)
                self._progress.message(f"{error}; sending the update again")
                if isinstance(error, ChecksumMismatch):
                    self._journal.begin_next_attempt()  # the server starts again from the first byte
            except ProtocolError as error:
                return self.refuse(error)
        raise AssertionError("the last send returns or raises")

    def refuse(self, error: ProtocolError) -> Delivered:
        """Drop the round because of an error of the server. Raises the `MAX_REFUSALS`-th such error in a row."""
        self._refusals += 1
        dropped = self.drop(error)
        if self._refusals >= MAX_REFUSALS:
            raise error
        return dropped

    def drop(self, error: EdgefedError) -> Delivered:
        """Drop the round in the journal and its update, and wait a little."""
        server_round = self._journal.record.server_round
        self._progress.done()
        self._progress.message(f"round {server_round} continues without this device: {error}")
        self._write_ledger(error.code)
        self._journal.drop_pending()
        self._setbacks += 1
        self._retry.wait(self._setbacks, LONGEST_SETBACK_S)
        return Delivered(server_round, error)

    def _send(self) -> Delivered:
        self._journal.begin_upload()
        meta, path = self._pending(), self._journal.pending_path
        self._acknowledged = 0

        def upload() -> None:
            self._progress.phase("upload", meta.size_bytes, "B")
            self._client.upload(meta.server_round, meta.attempt, path, self._progress.advance, self._note_offset)

        try:
            self._call(upload)
            final = self._with_rates(meta)
            self._call(lambda: self._client.commit(final))
        finally:
            self._progress.done()
        entry = self._write_ledger("accepted")
        # Take the bytes from the entry, not from the client: heartbeats continue in another thread.
        self._journal.acknowledge(bytes_down=entry.bytes_down, bytes_up=entry.bytes_up)
        self._refusals = self._setbacks = 0
        return Delivered(meta.server_round, metrics=meta.metrics)

    def _with_rates(self, meta: UpdateMeta) -> UpdateMeta:
        """Add the rates of transfers, including this upload, to the survey of ``meta``, if it has one."""
        if meta.survey is None:
            return meta
        rates = self._client.rates
        found = {"upload_bytes_per_s": rates.up_bytes_per_s, "download_bytes_per_s": rates.down_bytes_per_s}
        known = {name: rate for name, rate in found.items() if rate is not None and rate >= 1}
        return msgspec.structs.replace(meta, survey=msgspec.structs.replace(meta.survey, **known))

    def count_download(self, n: int) -> None:
        """Count ``n`` downloaded bytes as progress, on the screen and for the retries."""
        self._retry.note_progress()
        self._progress.advance(n)

    def _note_offset(self, offset: int) -> None:
        """Only bytes that the server has are progress: a proxy may swallow a body and then refuse it."""
        if offset > self._acknowledged:
            self._acknowledged = offset
            self._retry.note_progress()

    def _pending(self) -> UpdateMeta:
        assert self._journal.pending is not None, "no update waits for delivery"
        return self._journal.pending

    def _is_intact(self, meta: UpdateMeta) -> bool:
        try:
            return hash_file(self._journal.pending_path) == (meta.sha256, meta.size_bytes)
        except StorageError:
            return False

    def _round_bytes_down(self) -> int:
        return self.bytes_down + (self._journal.record.round_bytes_down if self._resumed else 0)

    def _write_ledger(self, outcome: str) -> LedgerEntry:
        record, path = self._journal.record, self._journal.folder / LEDGER_FILE
        last = last_entry(path) if self._resumed else None
        if last is not None and (last.run_id, last.server_round, last.attempt, last.outcome) == (
            record.run_id, record.server_round, record.attempt, outcome
        ):  # fmt: skip
            return last  # written by the process before, which ended before its next step
        meta = record.update
        seconds = dict(record.round_seconds)
        for name, value in self._progress.take_seconds().items():
            seconds[name] = round(seconds.get(name, 0.0) + value, 3)
        entry = LedgerEntry(
            ended_at=utc_now(),
            run_id=record.run_id,
            server_round=record.server_round,
            attempt=record.attempt,
            outcome=outcome,
            resumed=self._resumed,
            bytes_down=self._round_bytes_down(),
            bytes_up=self._client.bytes_up - self._start[1],
            seconds=seconds,
            experts_resident=len(meta.experts) if meta else 0,
            experts_changed=sum(report.steps > 0 for report in meta.experts) if meta else 0,
            metrics=meta.metrics if meta else {},
        )
        append_entry(path, entry)
        return entry
