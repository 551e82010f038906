"""The requests of clients, without HTTP: which client may do what, in which round.

Methods of `Service` block and are thread-safe. They take what the routes carry and raise errors of `edgefed.errors`;
`app` puts them on the wire. Arguments come from the network unchecked: ids and numbers are checked here.
"""

from __future__ import annotations

import hmac
import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgefed.aggregator import rounds
from edgefed.aggregator.access import OWNER, Credentials
from edgefed.aggregator.active_run import ActiveRun
from edgefed.aggregator.members import make_room_for_client
from edgefed.aggregator.metrics import metrics_text
from edgefed.aggregator.records import ClientRecord, UpdateRecord
from edgefed.aggregator.rounds import Phase
from edgefed.aggregator.status import Presence, client_label, describe_comparison, wait_reason
from edgefed.aggregator.stopping import finish_reason
from edgefed.aggregator.uploads import PartWriter, UploadName
from edgefed.aggregator.validate import (
    MAX_TEXT_CHARACTERS,
    check_register,
    digest,
    digest_bytes,
    is_size,
    is_text,
    parse_number,
    validate_update,
)
from edgefed.disk import hash_file
from edgefed.errors import (
    ChecksumMismatch,
    IdentityInUse,
    InvalidUpdate,
    MalformedMessage,
    NotFound,
    OffsetMismatch,
    ProtocolError,
    StorageError,
    Unauthorized,
    UnknownClient,
    UpdateTooLarge,
)
from edgefed.progress import IDLE_PHASE
from edgefed.protocol import routes
from edgefed.protocol.comparison import COMPARING_PHASE, Comparison, is_sound
from edgefed.protocol.coverage import ExpertCoverage
from edgefed.protocol.messages import (
    Assignment,
    AssignmentReply,
    Finished,
    Heartbeat,
    Register,
    Registered,
    Status,
    UnitInfo,
    UpdateAccepted,
    UpdateMeta,
    UploadState,
    Wait,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0
MAX_HEARTBEAT_S = 10.0
META_BYTES, META_EXPERT_BYTES = 128 * 1024, 512
"""Size of an update's meta: names and metrics, and for each expert a report and its place in a survey."""
HEARTBEATS_PER_TIMEOUT = 4
"""A client counts as lost after this many missing heartbeats."""


class Service:
    """The requests of clients to one run."""

    def __init__(self, run: ActiveRun, *, invite_only: bool = False):
        """``invite_only``: the token does not suffice to join."""
        self._run, self._invite_only = run, invite_only
        self.access, self.repairs, self.run_id = run.access, run.repairs, run.config.run_id
        self._ids_by_key = {client.key_sha256: client.client_id for client in run.clients.values()}
        self._ids_by_folded = {client_id.casefold(): client_id for client_id in run.clients}
        self._commit_locks: dict[str, threading.Lock] = {}
        self.heartbeat_s = min(MAX_HEARTBEAT_S, run.policy.client_timeout_s / HEARTBEATS_PER_TIMEOUT)

    # --- clients ------------------------------------------------------------------------------------------------

    def register(self, message: Register, credentials: Credentials = OWNER) -> Registered:
        """Register a new client, or one again. Raises VersionMismatch, MalformedMessage, Unauthorized, ServerFull."""
        check_register(message)
        run, key_sha256 = self._run, digest(message.client_key)
        with run.lock:
            known = run.clients.get(message.client_id)
            if known is not None and not hmac.compare_digest(known.key_sha256, key_sha256):
                raise Unauthorized(f"client id {message.client_id!r} belongs to a client with another key")
            # File names must differ in more than case: some file systems ignore it.
            folded = message.client_id.casefold()
            if known is None and self._ids_by_folded.get(folded) in run.clients:
                raise MalformedMessage(f"client id {message.client_id!r} differs from a registered one in case only")
            if known is None:
                make_room_for_client(run)
            run.access.admit(message.client_id, credentials, known=known is not None, invite_only=self._invite_only)
            client = ClientRecord(
                client_id=message.client_id,
                name=message.name,
                key_sha256=key_sha256,
                memory_bytes=message.memory_bytes,
                expert_share=message.expert_share,
                compute_share=message.compute_share,
                num_examples=message.num_examples,
                device=message.device,
            )
            if known is not None:
                client.rounds_done, client.metrics, client.survey = known.rounds_done, known.metrics, known.survey
                client.comparison = known.comparison
                client.held_out = known.held_out
                client.uploaded_bytes, client.downloaded_bytes = known.uploaded_bytes, known.downloaded_bytes
            client.last_seen_at = time.time()
            run.store.save_clients([client])
            run.clients[client.client_id] = client
            presence = run.presence.setdefault(client.client_id, Presence())
            if known is None or not known.joined:
                logger.info("%s joined%s", client_label(client), "" if known is None else " again")
            elif presence.instance not in ("", message.instance):
                logger.info("%s registers from another process than before", client_label(client))
            presence.instance, presence.refused = message.instance, False
            self._ids_by_key[key_sha256] = self._ids_by_folded[folded] = client.client_id
            run.apply(rounds.ClientJoined(run.clock(), client.client_id))
        return Registered(run=run.config, heartbeat_s=self.heartbeat_s)

    def check_instance(self, client_id: str, key: str, instance: str) -> None:
        """Raise IdentityInUse if another process has registered as this client since ``instance`` did.

        "" is a client of an earlier version, or a request without a registration.
        """
        run = self._run
        with run.lock:
            client = run.authenticate(client_id, key)
            presence = run.presence.setdefault(client_id, Presence())
            if not instance or not presence.instance or instance == presence.instance:
                return
            if not presence.refused:
                presence.refused = True
                logger.warning(
                    "two processes use the identity of %s; the one that registered last stays. "
                    "Was its state folder copied?", client_label(client),
                )  # fmt: skip
        raise IdentityInUse(
            f"another process has registered with this device's identity, as {client.name!r} (client {client_id}); "
            "its state folder may be a copy"
        )

    def check_signed(self, client_id: str, credentials: Credentials) -> None:
        """Raise Unauthorized if a client has a device key and the request is not signed with it, or if it is banned."""
        self.access.check_banned(client_id)
        expected = self.access.key_of(client_id)
        if expected and credentials.public_key != expected:
            raise Unauthorized(f"requests of client {client_id!r} must be signed with its device's key")

    def heartbeat(self, client_id: str, key: str, message: Heartbeat) -> None:
        """Record what a client is doing."""
        with self._run.seen(client_id, key):
            if not 0.0 <= message.fraction <= 1.0 or not is_text(message.phase, 64):
                raise MalformedMessage(f"heartbeat has phase {message.phase[:64]!r}, fraction {message.fraction}")
            if message.budget_bytes is not None and not is_size(message.budget_bytes):
                raise MalformedMessage(f"heartbeat has budget_bytes {message.budget_bytes}")
            presence = self._run.presence.setdefault(client_id, Presence())
            presence.phase, presence.fraction = message.phase, message.fraction
            presence.comparing |= message.phase == COMPARING_PHASE
            presence.budget_bytes = message.budget_bytes

    def leave(self, client_id: str, key: str, reason: str) -> None:
        """A client leaves; the round does not wait for it."""
        run = self._run
        with run.lock:
            client = run.authenticate(client_id, key)
            run.note_left(client)
            run.store.save_clients([client])
            run.apply(rounds.ClientLeft(run.clock(), client_id))
        run.uploads.discard_of({client_id}, UnknownClient(f"client {client_id!r} has left"))
        logger.info("%s left: %r", client_label(client), reason[:MAX_TEXT_CHARACTERS])

    def compare(self, client_id: str, key: str, message: Comparison) -> None:
        """Store what a client compared at the end of the run. Raises MalformedMessage."""
        if not is_sound(message):
            raise MalformedMessage("invalid comparison: expected finite losses and short texts")
        with self._run.seen(client_id, key) as client:
            presence = self._run.presence.setdefault(client_id, Presence())
            presence.comparing, presence.phase, presence.fraction = False, IDLE_PHASE, 0.0
            client.comparison = message
            self._run.store.save_clients([client])
        logger.info("%s: %s", client_label(client), describe_comparison(message))

    def assignment(self, client_id: str, key: str) -> AssignmentReply:
        """What the client has to do now. Raises UnknownClient if it has left."""
        run = self._run
        with run.seen(client_id, key) as client:
            state, now = run.state, run.clock()
            if state.phase is Phase.FINISHED:
                run.presence.setdefault(client_id, Presence()).heard_finished = True
                return Finished(server_round=state.server_round, reason=finish_reason(state))
            if not client.joined:
                raise UnknownClient(f"client {client_id!r} has left; it must register again")
            if state.is_trainer(client_id):
                remaining = None if state.deadline is None else max(0.0, state.deadline - now)
                # The same for all clients: ids differ from run to run, and each client mixes in its own name.
                seed = digest_bytes(f"{run.config.seed}/{state.server_round}")[:4]
                return Assignment(
                    server_round=state.server_round,
                    deadline_s=remaining,
                    seed=int.from_bytes(seed, "little"),
                    experts=run.assigner.assignment(client_id, run.clients, run.catalog.manifest, run.config.seed),
                )
            left = [other.name for other in run.clients.values() if not other.joined]
            return Wait(retry_after_s=RETRY_AFTER_S, reason=wait_reason(state, client_id, now, left))

    def status(self) -> Status:
        """The status of the run."""
        return self._run.status()

    def coverage(self) -> ExpertCoverage:
        """Which experts the clients hold and train."""
        return self._run.store.coverage()

    def metrics(self, connections: Mapping[str, int]) -> str:
        """The run in numbers, for Prometheus. ``connections``: see `metrics_text`."""
        free_bytes = shutil.disk_usage(self._run.store.folder).free
        return metrics_text(self.status(), self.coverage(), connections, free_bytes)

    @property
    def max_meta_bytes(self) -> int:
        """Largest `UpdateMeta` that a client of this run can need."""
        experts = sum(self._run.store.experts_per_layer)
        return min(routes.MAX_MESSAGE_BYTES, META_BYTES + META_EXPERT_BYTES * experts)

    @property
    def closing(self) -> bool:
        """Whether the server stops; a waiting client then gets its answer at once."""
        return self._run.closing

    # --- downloads ----------------------------------------------------------------------------------------------

    def manifest(self, which: str) -> bytes:
        """The encoded manifest of a round, or of the "latest". Raises NotFound, MalformedMessage."""
        with self._run.lock:
            number = self._run.state.server_round if which == "latest" else parse_number(which, "round")
            return self._run.catalog.encoded_manifest(number)

    def blob(self, sha256: str) -> tuple[Path, int]:
        """Path and size of a blob of a stored manifest. Raises NotFound for any other name."""
        return self._run.catalog.blob(sha256)

    def check_blob(self, sha256: str, *, again: bool) -> None:
        """Compare the hash of a blob, ``again`` or for the first time. Raises StorageError if it is damaged."""
        check = self.repairs.check if again else self.repairs.check_once
        check(self._run.catalog.name_of(sha256), sha256, self._run.catalog.blob(sha256)[1])
        self.repairs.check_wanted(sha256)

    def note_download(self, key: str, size_bytes: int) -> None:
        """Count downloaded bytes for the client with this key, if any: blobs may be fetched without one."""
        run = self._run
        with run.lock:
            client_id = self._ids_by_key.get(digest(key))
            if client_id in run.clients:
                run.clients[client_id].downloaded_bytes += size_bytes
                run.apply(rounds.ClientSeen(run.clock(), client_id))

    # --- uploads ------------------------------------------------------------------------------------------------

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

    def close_upload(self, name: UploadName, writer: PartWriter, *, refused: ProtocolError | None = None) -> int:
        """End a connection; return the bytes that have arrived. An upload that is too large is deleted."""
        run = self._run
        run.uploads.close(name, writer)
        if isinstance(refused, UpdateTooLarge):
            run.uploads.discard(name, refused)
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
                units = run.catalog.manifest.units
            name = UploadName(client_id, server_round, attempt)
            try:
                self._verify(name, run.uploads.seal(name), meta, units)
                self._accept(name, meta)
            except (StorageError, NotFound):
                with run.lock:  # the part may be gone because the round was closed meanwhile; then report that
                    run.check_open(client_id, server_round)
                raise
        return UpdateAccepted(server_round=server_round, repeated=False)

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
            validate_update(path, meta, units, run.store.experts_per_layer, run.backend, run.claim_limits)
        except ProtocolError as refusal:
            run.uploads.discard(name, refusal)
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
