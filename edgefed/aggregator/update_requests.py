"""The requests that bring an update: how much has arrived, more bytes, and the commit that checks and records it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from edgefed.aggregator import rounds
from edgefed.aggregator.active_run import ActiveRun
from edgefed.aggregator.bucket import Bucket
from edgefed.aggregator.records import UpdateRecord
from edgefed.aggregator.rounds import Phase
from edgefed.aggregator.status import Presence, client_label
from edgefed.aggregator.uploads import PartWriter, UploadName
from edgefed.aggregator.validate import validate_update
from edgefed.disk import hash_file
from edgefed.errors import (
    ChecksumMismatch,
    InvalidUpdate,
    MalformedMessage,
    NotFound,
    OffsetMismatch,
    ProtocolError,
    StorageError,
    UpdateTooLarge,
)
from edgefed.progress import IDLE_PHASE
from edgefed.protocol.alternation import sent_units
from edgefed.protocol.messages import UnitInfo, UpdateAccepted, UpdateMeta, UploadState
from edgefed.protocol.ranks import rank_problem, with_rank

logger = logging.getLogger(__name__)


class UpdateRequests:
    """Takes the updates of the clients of one run."""

    def __init__(self, run: ActiveRun):
        self._run = run
        self._commit_locks: dict[str, threading.Lock] = {}

    def upload_state(
        self, client_id: str, key: str, server_round: int, attempt: int, size: int | None = None
    ) -> UploadState:
        """How much of an upload has arrived. Raises RoundClosed or UpdateConflict if it can no longer count.

        ``size``: bytes of the whole upload. Raises UpdateTooLarge, DiskFull if the rest of them would be refused.
        """
        run, name = self._run, UploadName(client_id, server_round, attempt)
        with run.seen(client_id, key):
            update = run.store.find_update(server_round, client_id)
            if update is not None and update.attempt == attempt:
                return UploadState(offset=update.size_bytes, status="accepted")
            run.check_open(client_id, server_round, update)
        offset = run.uploads.offset(name)
        if size is not None and size > offset:
            run.uploads.check_room(name, offset, size - offset, run.catalog.limit_bytes, run.absent_clients)
        if run.bucket is not None:
            return run.bucket.upload_state(name, run.catalog.limit_bytes)
        return UploadState(offset=offset, status="partial")

    def open_upload(
        self, client_id: str, key: str, server_round: int, attempt: int, offset: int, length: int | None
    ) -> tuple[UploadName, PartWriter]:
        """Continue an upload at ``offset`` with ``length`` bytes (None: unknown). The caller ends it: `close_upload`.

        Raises OffsetMismatch, RoundClosed, UpdateConflict, UpdateTooLarge.
        """
        run, name = self._run, UploadName(client_id, server_round, attempt)
        with run.seen(client_id, key):
            update = run.store.find_update(server_round, client_id)
            if update is not None and update.attempt == attempt:
                raise OffsetMismatch("this upload is complete and was accepted", offset=update.size_bytes)
            run.check_open(client_id, server_round, update)
            limit_bytes = run.catalog.limit_bytes
        run.uploads.check_room(name, offset, length, limit_bytes, run.absent_clients)
        return name, run.uploads.open(name, offset, limit_bytes)

    def _discard(self, name: UploadName, reason: ProtocolError) -> None:
        """Delete an upload that is refused."""
        self._run.uploads.discard(name, reason)
        if self._run.bucket is not None:
            self._run.bucket.delete_update(name)

    def close_upload(self, name: UploadName, writer: PartWriter, *, refused: ProtocolError | None = None) -> int:
        """End a connection; return the bytes that have arrived. An upload that is too large is deleted."""
        run = self._run
        run.uploads.close(name, writer)
        if isinstance(refused, UpdateTooLarge):
            self._discard(name, refused)
        with run.lock:
            run.apply(rounds.ClientSeen(run.clock(), name.client_id))
        return writer.offset

    def commit(self, client_id: str, key: str, server_round: int, attempt: int, meta: UpdateMeta) -> UpdateAccepted:
        """Verify an upload and add it to the round. When this returns, the update survives any crash.

        A repeated update is acknowledged again, also after its round. Raises UpdateConflict (another one was
        acknowledged), RoundClosed, OffsetMismatch (bytes are missing), ChecksumMismatch, InvalidUpdate, DiskFull.
        """
        if (meta.client_id, meta.server_round, meta.attempt) != (client_id, server_round, attempt):
            raise MalformedMessage(
                f"the commit of {client_id[:64]!r}, round {server_round}, attempt {attempt} says that it is of "
                f"{meta.client_id[:64]!r}, round {meta.server_round}, attempt {meta.attempt}"
            )
        run = self._run
        with run.seen(client_id, key):
            lock = self._commit_locks.setdefault(client_id, threading.Lock())
        with lock:
            with run.lock:
                update = run.store.find_update(server_round, client_id)
                if update is not None and update.sha256 == meta.sha256:
                    return UpdateAccepted(server_round=server_round, repeated=True)
                run.check_open(client_id, server_round, update)
                units = sent_units(run.catalog.manifest.units, run.config.training, server_round)
            name = UploadName(client_id, server_round, attempt)
            try:
                if run.bucket is not None:
                    self._collect(run.bucket, name, meta.size_bytes)
                self._verify(name, run.uploads.seal(name), meta, units)
                self._accept(name, meta)
            except (StorageError, NotFound):
                with run.lock:  # the part may be gone because the round was closed meanwhile; then report that
                    run.check_open(client_id, server_round)
                raise
            if run.bucket is not None:
                run.bucket.delete_update(name)
        return UpdateAccepted(server_round=server_round, repeated=False)

    def _collect(self, bucket: Bucket, name: UploadName, size_bytes: int) -> None:
        """Copy an update from the bucket into the state folder. Raises UpdateTooLarge, DiskFull."""
        run = self._run
        offset = run.uploads.offset(name)
        if size_bytes > offset:
            run.uploads.check_room(name, offset, size_bytes - offset, run.catalog.limit_bytes, run.absent_clients)
            bucket.collect(name, size_bytes, run.uploads)

    def _verify(self, name: UploadName, path: Path, meta: UpdateMeta, units: Sequence[UnitInfo]) -> None:
        run = self._run
        arrived = run.uploads.offset(name)
        if arrived < meta.size_bytes:
            raise OffsetMismatch(f"{arrived} of {meta.size_bytes} bytes have arrived", offset=arrived)
        try:
            if arrived > meta.size_bytes:
                raise ChecksumMismatch(f"{arrived} bytes have arrived, the update has {meta.size_bytes}")
            found, _ = hash_file(path)
            if found != meta.sha256:
                raise ChecksumMismatch(f"what arrived has SHA-256 {found}, the update has {meta.sha256[:64]!r}")
            if problem := rank_problem(meta.lora_rank, run.config.training):
                raise InvalidUpdate(f"lora_rank {problem}")
            units = with_rank(units, meta.lora_rank)
            validate_update(path, meta, units, run.store.experts_per_layer, run.backend, run.claim_limits)
        except ProtocolError as refusal:
            self._discard(name, refusal)
            if isinstance(refusal, InvalidUpdate):
                logger.warning(
                    "round %d: update of %s refused: %s",
                    *(name.server_round, client_label(run.clients[name.client_id]), refusal),
                )
            raise

    def _accept(self, name: UploadName, meta: UpdateMeta) -> None:
        """File first, then the record, then the state machine, then the acknowledgement."""
        run, client_id, server_round = self._run, name.client_id, name.server_round
        update = UpdateRecord(server_round, client_id, name.attempt, meta.sha256, meta.size_bytes, meta)
        path = run.uploads.promote(name, update.file_name)
        with run.lock:
            try:
                run.check_open(client_id, server_round)
            except ProtocolError:
                path.unlink(missing_ok=True)
                raise
            client = run.clients[client_id]
            before = client.rounds_done, client.uploaded_bytes, client.metrics
            client.rounds_done += 1
            client.uploaded_bytes += meta.size_bytes
            client.metrics = dict(meta.metrics)
            try:
                run.store.record_update(update, client)
            except BaseException:
                client.rounds_done, client.uploaded_bytes, client.metrics = before
                run.uploads.demote(name, path)
                raise
            presence = run.presence.setdefault(client_id, Presence())
            presence.phase, presence.fraction = IDLE_PHASE, 0.0  # the next heartbeat may be seconds away
            size_mib = meta.size_bytes / 2**20
            logger.info("round %d: update of %s accepted, %.1f MiB", server_round, client_label(client), size_mib)
            late = server_round < run.state.server_round or run.state.phase is Phase.AGGREGATING
            run.apply(rounds.UpdateAccepted(run.clock(), client_id, late))
