"""A run in progress: the pure round state machine together with the store, the clients and the files of its folder.

One lock guards the state machine and the client list. It is held for at most a transaction, never while a file is
hashed, checked or folded. Opening a run resumes where the last process stopped, however it ended. The server calls
`ActiveRun.tick` regularly and `ActiveRun.fold_pending` when `ActiveRun.fold_due` is true. `service` has the requests of
clients.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgefed.aggregator import rounds
from edgefed.aggregator.access import Access
from edgefed.aggregator.aggregation import HELD_OUT_LOSS, Aggregation, within_claims
from edgefed.aggregator.assigning import Assigner, combined_survey
from edgefed.aggregator.blobs import BlobStore, Catalog
from edgefed.aggregator.bucket import Bucket
from edgefed.aggregator.coverage import cover_round
from edgefed.aggregator.creation import change_policy
from edgefed.aggregator.privacy import check_privacy, spent
from edgefed.aggregator.records import ClientRecord, UpdateRecord
from edgefed.aggregator.repair import Repairs
from edgefed.aggregator.rounds import Phase
from edgefed.aggregator.staleness import buffer_of
from edgefed.aggregator.status import Presence, build_status, describe_round, downloads_since, log_action, round_status
from edgefed.aggregator.stopping import best_round, close_round, loss_metrics, restored_metric
from edgefed.aggregator.store import Store
from edgefed.aggregator.uploads import UploadFolder
from edgefed.aggregator.validate import ClaimLimits, check_client_id, digest
from edgefed.disk import make_private
from edgefed.errors import (
    NotFound,
    ObjectStorageError,
    RoundClosed,
    StorageError,
    Unauthorized,
    UnknownClient,
    UpdateConflict,
)
from edgefed.kernels.fold import select_backend
from edgefed.methods.interface import Method
from edgefed.progress import counted
from edgefed.protocol.messages import UNIT_KINDS, RoundStatus, RunConfig, SetAside, Status
from edgefed.protocol.privacy import PrivacyStatus

logger = logging.getLogger(__name__)

STANDSTILL_TICKS = 12
"""A gap of so many ticks means that this process did not run: it was suspended, or its disk stalled."""


class ActiveRun:
    """An open run. ``lock`` guards ``state`` and ``clients``; everything else may be used from any thread."""

    def __init__(
        self,
        folder: Path,
        make_method: Callable[[str, dict[str, Any]], Method],
        *,
        keep_rounds: int = 2,
        fold_backend: str = "auto",
        fold_threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[], None] = lambda: None,
        tick_s: float | None = None,
        policy_changes: Mapping[str, object] = MappingProxyType({}),
        on_round: Callable[[RunConfig, RoundStatus], None] = lambda run, status: None,
        bucket: Callable[[str], Bucket] | None = None,
    ):
        """Open the run in ``folder``.

        ``make_method`` builds the run's method from its name and options. ``keep_rounds`` manifests stay downloadable
        (0: all of them). ``on_change`` is called, from any thread, whenever a waiting client may get another answer.
        ``tick_s``: how often the caller promises to call `tick`; a much longer gap then means that this process stood
        still, which is not counted as silence of the clients. ``policy_changes``: fields of `RoundPolicy` that replace
        the run's, from now on. ``on_round`` is called with each round that was aggregated. ``bucket`` opens the object
        storage of a run id, which is filled first. Raises the errors of `Store`, ``make_method``, `select_backend` and
        `Bucket`; ConfigError for an invalid policy.
        """
        self._standstill_s = None if tick_s is None else max(STANDSTILL_TICKS * tick_s, 0.0)
        self._applied_at, self._on_round = clock(), on_round
        self.clock, self._keep_rounds, self._fold_threads, self._on_change = clock, keep_rounds, fold_threads, on_change
        self.backend = select_backend(fold_backend)
        self.lock = threading.RLock()
        self.presence: dict[str, Presence] = {}
        self._closing = threading.Event()
        self._phase_unsaved = False
        self.store = Store(folder)
        make_private(folder)
        try:
            self.config, self.policy = self.store.run, change_policy(self.store, policy_changes)
            self._method = make_method(self.config.method, dict(self.config.method_options))
            self._blobs, self.uploads = BlobStore(folder), UploadFolder(folder)
            self.catalog = Catalog(self.store, self._blobs)
            if self.config.privacy is not None:
                check_privacy(self.config.privacy, self.catalog.manifest.units)
            self.repairs = Repairs(self._blobs)
            for sha256, size_bytes in self.catalog.check_files().items():
                self.repairs.mark(self.catalog.name_of(sha256), sha256, size_bytes, "is missing or of another size")
            self.bucket = bucket(self.config.run_id) if bucket else None
            self.assigner = Assigner(self._method, self.store)
            self.access = Access(folder)
            try:
                self._resume()
            except BaseException:
                self.access.close()
                raise
        except BaseException:
            self.store.close()
            raise

    def _resume(self) -> None:
        """Continue the newest round with its accepted updates, and tidy up after a crash."""
        current = self.store.current_round()
        updates = self.store.pending_updates()
        takes_uploads = current.phase in (Phase.WAITING, Phase.TRAINING)
        newest = current.server_round if takes_uploads else current.server_round - 1
        self.uploads.recover(range(current.server_round - self.policy.max_staleness, newest + 1), updates)
        self.clients = {client.client_id: client for client in self.store.clients()}
        self.state = rounds.restore(
            self.policy,
            self.config.seed,
            phase=current.phase,
            server_round=current.server_round,
            participants=current.participants,
            accepted=[update.client_id for update in updates],
            late=[update.client_id for update in updates if update.server_round < current.server_round],
            clients=[client.client_id for client in self.clients.values() if client.joined],
            lost={
                client.client_id: time.time() - (client.last_seen_at or 0.0)
                for client in self.clients.values()
                if client.joined and client.lost
            },
            now=self.clock(),
        )
        logger.info(
            "run %s: round %d of %d, %s, with %s",
            *(self.config.run_id[:8], min(current.server_round, self.config.rounds), self.config.rounds),
            *(current.phase.value, counted(len(updates), "update")),
        )
        self._tidy([])
        if self.bucket is not None:
            self.bucket.synchronize(self.catalog.referenced, self._blobs.path)
        self.tick()

    def stop_waiting(self) -> None:
        """Begin to stop: long polls return and a fold in progress ends."""
        self._closing.set()
        self._on_change()

    def close(self) -> None:
        """Stop, save the clients, and release the folder."""
        self.stop_waiting()
        with self.lock, contextlib.suppress(StorageError):  # at worst, byte counters and times are lost
            for client in self.clients.values():
                if client.joined and not client.lost:
                    client.last_seen_at = self._seen_at(client)
            self.store.save_clients(self.clients.values())
        self.access.close()
        self.store.close()

    @property
    def closing(self) -> bool:
        """Whether the run is being closed."""
        return self._closing.is_set()

    # --- clients ------------------------------------------------------------------------------------------------

    def authenticate(self, client_id: str, key: str) -> ClientRecord:
        """The client with this id and key. Call with the lock. Raises MalformedMessage, UnknownClient, Unauthorized."""
        check_client_id(client_id)
        client = self.clients.get(client_id)
        if client is None:
            raise UnknownClient(f"client {client_id!r} is not registered with this run")
        if not hmac.compare_digest(client.key_sha256, digest(key)):
            raise Unauthorized(f"wrong key for client {client_id!r}")
        return client

    @contextlib.contextmanager
    def seen(self, client_id: str, key: str) -> Iterator[ClientRecord]:
        """Authenticate a client and mark it as live, and hold the lock meanwhile."""
        with self.lock:
            client = self.authenticate(client_id, key)
            self.apply(rounds.ClientSeen(self.clock(), client_id))
            yield client

    def absent_clients(self) -> set[str]:
        """The clients that have left or fallen silent."""
        with self.lock:
            return {c.client_id for c in self.clients.values() if not c.joined or self.lost(c)}

    @property
    def claim_limits(self) -> ClaimLimits:
        """What an update may claim of itself."""
        training, method = self.config.training, self._method
        if method.personal:
            return ClaimLimits()
        tokens = training.local_steps * training.batch_size * training.sequence_length
        return ClaimLimits(tokens, method.importance_limit)

    def check_open(self, client_id: str, server_round: int, update: UpdateRecord | None = None) -> None:
        """Raise unless an update of this client for this round would count. ``update``: one accepted before."""
        state = self.state
        if update is not None:
            raise UpdateConflict(
                f"attempt {update.attempt} of client {client_id!r} was accepted in round {server_round}"
            )
        if server_round > state.server_round:
            raise NotFound(f"round {server_round} has not begun, the current round is {state.server_round}")
        if state.accepts_late(client_id, server_round) and client_id in self.store.participants(server_round):
            return
        if server_round < state.server_round or state.phase in (Phase.AGGREGATING, Phase.FINISHED):
            raise RoundClosed(f"round {server_round} is closed")
        if not state.accepts(client_id):
            raise RoundClosed(f"client {client_id!r} takes no part in round {server_round}")

    # --- rounds -------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Let time pass: deadlines and silent clients. Records which clients fall silent or return."""
        with self.lock:
            self.apply(rounds.Tick(self.clock()))
            changed = [client for client in self.clients.values() if client.joined and client.lost != self.lost(client)]
            for client in changed:
                client.last_seen_at, client.lost = self._seen_at(client), not client.lost
            if changed:
                try:
                    self.store.save_clients(changed)
                except StorageError as error:
                    logger.error("clients that fell silent or returned are not stored: %s", error)

    def lost(self, client: ClientRecord) -> bool:
        """Whether a client has fallen silent. Call with the lock."""
        return not self.state.is_live(client.client_id, self.clock())

    def _seen_at(self, client: ClientRecord) -> float:
        """When a client was last heard of, in seconds since the epoch."""
        now = self.clock()
        return time.time() - max(0.0, now - self.state.last_seen.get(client.client_id, now))

    def note_left(self, client: ClientRecord) -> None:
        """Mark a client as left, now. Call with the lock."""
        client.joined, client.lost, client.last_seen_at = False, False, time.time()

    def apply(self, event: rounds.Event) -> None:
        """Step the state machine and store its phase. Call with the lock.

        A full disk may delay the latter. That is harmless: a restart would then forget only which clients were chosen
        or that the round had closed, never an update.
        """
        gap, self._applied_at = event.now - self._applied_at, event.now
        if self._standstill_s is not None and gap > self._standstill_s:
            logger.warning("this process stood still for %.0f s; that is not counted as silence of the clients", gap)
            self.state = rounds.after_standstill(self.state, gap)
        before = self.state
        self.state, actions = rounds.step(before, event)
        recorded = ("server_round", "phase", "participants")
        moved = any(getattr(before, name) != getattr(self.state, name) for name in recorded)
        if moved or self._phase_unsaved:
            self._phase_unsaved = True
            try:
                self.store.save_round(self.state.server_round, self.state.phase, self.state.participants)
                self._phase_unsaved = False
            except StorageError as error:
                logger.error("the phase of round %d is not stored yet: %s", self.state.server_round, error)
        for action in actions:
            log_action(action)
            if isinstance(action, rounds.Fold):
                closed = RoundClosed(f"round {action.server_round} is closed")
                late = self.policy.max_staleness if action.server_round < self.policy.rounds else 0
                self.uploads.end_rounds(action.server_round + 1 - late, closed)
        if actions or moved:
            self._on_change()

    @property
    def fold_due(self) -> bool:
        """Whether a closed round waits for `fold_pending`."""
        return self.state.phase is Phase.AGGREGATING

    def fold_pending(self) -> None:
        """Aggregate the closed round, if there is one. For one thread at a time; may be repeated after any failure.

        Raises FoldCancelled if the run closes meanwhile, DiskFull and StorageError (try again later), and the errors
        of a method that fails whatever clients send.
        """
        if not self.fold_due:
            return
        started = time.monotonic()
        manifest, server_round = self.catalog.manifest, self.state.server_round
        pending = [update for update in self.store.pending_updates() if update.client_id in self.state.accepted]
        updates = [
            within_claims(update, self.clients[update.client_id].num_examples, self.config.training, self.config.rounds)
            for update in buffer_of(pending)
        ]
        banned = {u.client_id: "its client is banned" for u in updates if self.access.is_banned(u.client_id)}
        earlier = {client.client_id: client.held_out for client in self.clients.values()}
        metrics = loss_metrics(history := self.store.history(), updates, server_round)
        how = Aggregation(
            *(self._method, self.policy, self._blobs, self.backend, self._fold_threads, self._closing.is_set),
            repairs=self.repairs,
            privacy=self.config.privacy,
            training=self.config.training,
            server_round=server_round,
            model=self.store.manifest,
            optimizer=self.config.server_optimizer,
            moments=self.store.moments,
        )
        result = close_round(how, manifest, updates, banned.keys(), self.uploads.updates, earlier, metrics)
        result.set_aside.update(banned)
        if self.bucket is not None:
            names = [unit.sha256 for unit in result.changed if unit.kind in UNIT_KINDS]
            self.bucket.publish(names, self._blobs.path, self._closing)
        changed, used = result.changed, [update for update in updates if update.client_id not in result.set_aside]
        coverage = cover_round(*(self.store.coverage(), manifest, used, self.uploads.updates, self.clients))
        with self.lock:
            for update in used:
                assert update.meta is not None, "only updates with metadata count"
                survey, client = update.meta.survey, self.clients[update.client_id]
                loss = update.meta.metrics.get(HELD_OUT_LOSS)
                client.held_out = client.held_out if loss is None else (update.server_round, loss)
                client.survey = client.survey if survey is None else combined_survey(client.survey, survey)
            set_aside = [
                SetAside(client_id=client_id, name=self.clients[client_id].name, reason=reason)
                for client_id, reason in sorted(result.set_aside.items())
            ]
            ends = result.restored is not None
            status = round_status(
                self.store.current_round(), used, changed, set_aside, result.undone,
                downloads=downloads_since(history, self.clients.values()), damaged=result.damaged,
                privacy=self._spent(), more_metrics={**metrics, **restored_metric(result), **result.metrics},
            )  # fmt: skip
            next_phase = Phase.FINISHED if ends or server_round >= self.policy.rounds else Phase.WAITING
            self.store.record_fold(status, changed, next_phase, self.clients.values(), coverage, updates)
            self.catalog.load(server_round + 1)
            for each in set_aside:
                logger.warning(
                    "round %d: the update of %r (%s) is set aside: %s",
                    *(server_round, each.name, each.client_id[:8], each.reason),
                )
            logger.info("%s", describe_round(status, self.policy.rounds, time.monotonic() - started))
            self.apply(rounds.Folded(self.clock(), server_round, last=ends))
        self._on_round(self.config, status)
        self._tidy(updates)

    def _spent(self) -> PrivacyStatus | None:
        """The privacy that the round in progress and those before it have cost the client with most updates."""
        privacy = self.config.privacy
        return None if privacy is None else spent(privacy, self.store.most_updates())

    def _tidy(self, folded: list[UpdateRecord]) -> None:
        """Delete files that no round needs. After a failure, the next start deletes them."""
        try:
            self.uploads.delete_updates(folded)
            with self.lock:
                to_undo = self.config.training.evaluate_every + 1 if self.policy.rollback else 0
                keep = self._keep_rounds and max(self._keep_rounds, self.policy.max_staleness + 1, to_undo)
                orphans = self.store.prune(keep, best_round(self.store.history()))
                self.catalog.load_references()
                oldest = self.state.server_round - self.policy.max_staleness
            self._blobs.delete(orphans)
            self.repairs.forget(orphans)
            if self.bucket is not None:
                self.bucket.delete_blobs(orphans)
                self.bucket.end_rounds(oldest)
        except (StorageError, ObjectStorageError) as error:
            logger.warning("files of old rounds are not deleted yet: %s", error)

    # --- status -------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """The status that clients and `edgefed status` get."""
        with self.lock:  # only copies are made under it: a thousand clients take milliseconds to describe
            facts = (self.config, self.state, list(self.clients.values()), dict(self.presence), self.store.history())
        return build_status(*facts, self.clock())

    def all_heard(self, idle_s: float) -> bool:
        """Whether the run is over and every client has left, fallen silent, or heard `Finished` and then nothing more.

        The latter means for ``idle_s`` seconds, because a client may still download the final model.
        """
        with self.lock:
            if self.state.phase is not Phase.FINISHED:
                return False
            now = self.clock()
            return all(
                (presence := self.presence.get(client_id, Presence())).heard_finished
                and not presence.comparing
                and now - self.state.last_seen[client_id] >= idle_s
                for client_id in self.state.live(now)
            )
