"""The requests of clients, without HTTP: which client may do what, in which round.

Methods of `Service` block and are thread-safe. They take what the routes carry and raise errors of `edgefed.errors`;
`app` puts them on the wire. Arguments come from the network unchecked: ids and numbers are checked here.
"""

from __future__ import annotations

import hmac
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from edgefed.aggregator import rounds
from edgefed.aggregator.access import OWNER, Credentials
from edgefed.aggregator.active_run import ActiveRun
from edgefed.aggregator.members import make_room_for_client
from edgefed.aggregator.metrics import metrics_text
from edgefed.aggregator.records import ClientRecord
from edgefed.aggregator.rounds import Phase, RoundState
from edgefed.aggregator.status import Presence, client_label, describe_comparison, wait_reason
from edgefed.aggregator.stopping import finish_reason
from edgefed.aggregator.update_requests import UpdateRequests
from edgefed.aggregator.validate import (
    MAX_TEXT_CHARACTERS,
    check_register,
    digest,
    digest_bytes,
    is_size,
    is_text,
    parse_number,
)
from edgefed.errors import (
    IdentityInUse,
    MalformedMessage,
    Unauthorized,
    UnknownClient,
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
    Wait,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0
MAX_HEARTBEAT_S = 10.0
META_BYTES, META_EXPERT_BYTES = 128 * 1024, 512
"""Size of an update's meta: names and metrics, and for each expert a report and its place in a survey."""
HEARTBEATS_PER_TIMEOUT = 4
"""A client counts as lost after this many missing heartbeats."""


class Service(UpdateRequests):
    """The requests of clients to one run; those that bring updates are in `update_requests`."""

    def __init__(self, run: ActiveRun, *, invite_only: bool = False):
        """``invite_only``: the token does not suffice to join."""
        super().__init__(run)
        self._invite_only = invite_only
        self._waits: tuple[tuple[int, int, int, int], str] = (0, 0, 0, 0), ""
        self.access, self.repairs, self.run_id, self.bucket = run.access, run.repairs, run.config.run_id, run.bucket
        self._ids_by_key = {client.key_sha256: client.client_id for client in run.clients.values()}
        self._ids_by_folded = {client_id.casefold(): client_id for client_id in run.clients}
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
                experts, limit = run.assigner.assignment(client_id, run.clients, run.catalog.manifest)
                return Assignment(
                    server_round=state.server_round, deadline_s=remaining, seed=int.from_bytes(seed, "little"),
                    experts=experts, train_limit=limit,
                )  # fmt: skip
            return Wait(retry_after_s=RETRY_AFTER_S, reason=self._wait_reason(state, client_id, now))

    def _wait_reason(self, state: RoundState, client_id: str, now: float) -> str:
        """`wait_reason`. A text that needs all clients is kept for a second, or until one of them comes or goes."""
        if state.phase is not Phase.WAITING:
            return wait_reason(state, client_id, now, [])
        moment = state.server_round, len(self._run.clients), len(state.last_seen), int(now)
        if self._waits[0] != moment:
            left = [other.name for other in self._run.clients.values() if not other.joined]
            self._waits = moment, wait_reason(state, client_id, now, left)
        return self._waits[1]

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

    def blob_url(self, sha256: str, key: str, size_bytes: int, *, anew: bool) -> str:
        """A signed URL of a blob, which counts as downloaded. ``anew``: a client found it damaged there; upload it."""
        bucket = self.bucket
        assert bucket is not None, "the run has no object storage"
        if anew:
            bucket.put_blob(sha256, self.blob(sha256)[0])
        url = bucket.blob_url(sha256)
        self.note_download(key, size_bytes)
        return url

    def note_download(self, key: str, size_bytes: int, whole_bytes: int = 0) -> None:
        """Count downloaded bytes for the client with this key, if any: blobs may be fetched without one.

        ``whole_bytes``: of the blob, where a change of it was sent.
        """
        run = self._run
        with run.lock:
            client_id = self._ids_by_key.get(digest(key))
            if client_id in run.clients:
                client = run.clients[client_id]
                client.downloaded_bytes += size_bytes
                if whole_bytes:
                    client.changed_bytes += size_bytes
                    client.saved_bytes += whole_bytes - size_bytes
                run.apply(rounds.ClientSeen(run.clock(), client_id))
