"""A run in progress: the pure round state machine joined to the store, the clients and the files of its state folder.

One lock guards the state machine and the client list. It is held for a transaction at most, never while a file is
hashed, checked or folded. Opening resumes where the last process stopped, however it stopped. Somebody else calls
`ActiveRun.tick` now and then and `ActiveRun.fold_pending` when `ActiveRun.fold_due` says so. What clients ask for is
in `service`.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edgefed.aggregator import rounds
from edgefed.aggregator.admission import check_client_id, digest
from edgefed.aggregator.assigning import Assigner, combined_survey
from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.catalog import Catalog
from edgefed.aggregator.fold import fold_round
from edgefed.aggregator.rounds import Phase
from edgefed.aggregator.status import Presence, build_status, round_status
from edgefed.aggregator.store import ClientRecord, Store, UpdateRecord
from edgefed.aggregator.uploads import UploadFolder
from edgefed.aggregator.validate import update_units
from edgefed.errors import (
    NotFound,
    RoundClosed,
    StateCorrupt,
    StorageError,
    Unauthorized,
    UnknownClient,
    UpdateConflict,
)
from edgefed.kernels.fold import select_backend
from edgefed.methods.interface import Contribution, Method
from edgefed.protocol.messages import Status

logger = logging.getLogger(__name__)


class ActiveRun:
    """An open run. ``lock`` guards ``state`` and ``clients``; everything else may be used from any thread."""

    def __init__(
        self,
        folder: Path,
        make_method: Callable[[str, dict], Method],
        *,
        keep_rounds: int = 2,
        fold_backend: str = "auto",
        fold_threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[], None] = lambda: None,
    ):
        """Open the run in ``folder``.

        ``make_method`` builds the run's method from its name and options. ``keep_rounds`` manifests stay downloadable
        (0: all of them). ``on_change`` is called, from any thread, whenever a waiting client may get another answer.
        Raises what `Store`, ``make_method`` and `select_backend` raise.
        """
        self.clock, self._keep_rounds, self._fold_threads, self._on_change = clock, keep_rounds, fold_threads, on_change
        self.backend = select_backend(fold_backend)
        self.lock = threading.RLock()
        self.presence: dict[str, Presence] = {}
        self._closing = threading.Event()
        self._phase_unsaved = False
        self.store = Store(folder)
        try:
            self.config, self.policy = self.store.run, self.store.policy
            self.policy.check()
            self._method = make_method(self.config.method, dict(self.config.method_options))
            self._blobs, self.uploads = BlobStore(folder), UploadFolder(folder)
            self.catalog = Catalog(self.store, self._blobs)
            self.catalog.check_files()
            self.assigner = Assigner(self._method, self.store)
            self._resume()
        except BaseException:
            self.store.close()
            raise

    def _resume(self) -> None:
        """Take up the newest round with what was accepted for it, and tidy up what a crash has left."""
        current = self.store.current_round()
        updates = self.store.updates(current.server_round)
        takes_uploads = current.phase in (Phase.WAITING, Phase.TRAINING)
        self.uploads.recover(current.server_round if takes_uploads else None, updates)
        for update in updates:
            path = self.uploads.updates / update.file_name
            if not path.is_file() or path.stat().st_size != update.size_bytes:
                raise StateCorrupt(f"the accepted update {path} is missing or has another size than was recorded")
        self.clients = {client.client_id: client for client in self.store.clients()}
        self.state = rounds.restore(
            self.policy,
            self.config.seed,
            phase=current.phase,
            server_round=current.server_round,
            participants=current.participants,
            accepted=[update.client_id for update in updates],
            clients=[client.client_id for client in self.clients.values() if client.joined],
            now=self.clock(),
        )
        logger.info(
            "run %s: round %d of %d is %s, updates so far: %d",
            *(self.config.run_id, current.server_round, self.config.rounds, current.phase.value, len(updates)),
        )
        self._tidy([])
        self.tick()

    def stop_waiting(self) -> None:
        """Begin to stop: long polls return and a fold under way ends."""
        self._closing.set()
        self._on_change()

    def close(self) -> None:
        """Stop, save what is known of the clients, and release the folder."""
        self.stop_waiting()
        with self.lock, contextlib.suppress(StorageError):  # only byte counters could be lost
            self.store.save_clients(self.clients.values())
        self.store.close()

    @property
    def closing(self) -> bool:
        return self._closing.is_set()

    # --- clients ------------------------------------------------------------------------------------------------

    def authenticate(self, client_id: str, key: str) -> ClientRecord:
        """The client with this id and key. Raises MalformedMessage, UnknownClient, Unauthorized. Call with the lock."""
        check_client_id(client_id)
        client = self.clients.get(client_id)
        if client is None:
            raise UnknownClient(f"client {client_id!r} is not registered with this run")
        if not hmac.compare_digest(client.key_sha256, digest(key)):
            raise Unauthorized(f"the key sent for client {client_id!r} is wrong")
        return client

    @contextlib.contextmanager
    def seen(self, client_id: str, key: str) -> Iterator[ClientRecord]:
        """Hold the lock, with the client authenticated and marked as live."""
        with self.lock:
            client = self.authenticate(client_id, key)
            self.apply(rounds.ClientSeen(self.clock(), client_id))
            yield client

    def check_open(self, client_id: str, server_round: int, update: UpdateRecord | None = None) -> None:
        """Raise unless an update of this client for this round would count. ``update``: the one accepted before."""
        state = self.state
        if update is not None:
            raise UpdateConflict(
                f"attempt {update.attempt} of client {client_id!r} was accepted in round {server_round}"
            )
        if server_round > state.server_round:
            raise NotFound(f"round {server_round} has not begun, round {state.server_round} has")
        if server_round < state.server_round or state.phase in (Phase.AGGREGATING, Phase.FINISHED):
            raise RoundClosed(f"round {server_round} is closed")
        if not state.accepts(client_id):
            raise RoundClosed(f"client {client_id!r} takes no part in round {server_round}")

    # --- rounds -------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Let time pass: deadlines and silent clients."""
        with self.lock:
            self.apply(rounds.Tick(self.clock()))

    def apply(self, event: rounds.Event) -> None:
        """Step the state machine and put its phase on disk. Call with the lock.

        A full disk may stop the latter for a while. That is harmless: what a restart would then forget is only who was
        chosen or that the round had closed, never an update.
        """
        before = self.state
        self.state, actions = rounds.step(before, event)
        recorded = ("server_round", "phase", "participants")
        moved = any(getattr(before, name) != getattr(self.state, name) for name in recorded)
        if moved or self._phase_unsaved:
            self._phase_unsaved = True
            try:
                self.store.save_round(self.state.server_round, self.state.phase, self.state.participants)
                self._phase_unsaved = False
            except StorageError as fault:
                logger.error("the phase of round %d is not on disk yet: %s", self.state.server_round, fault)
        for action in actions:
            self._announce(action)
        if actions or moved:
            self._on_change()

    def _announce(self, action: rounds.Action) -> None:
        if isinstance(action, rounds.OpenRound):
            logger.info("round %d: %d clients train", action.server_round, len(action.participants))
        elif isinstance(action, rounds.Fold):
            logger.info("round %d: closed with %d updates", action.server_round, len(action.clients))
            self.uploads.end_round(RoundClosed(f"round {action.server_round} is closed"))
        elif isinstance(action, rounds.ExtendDeadline):
            logger.warning("round %d: the deadline passed without an update; a new one runs", action.server_round)
        elif isinstance(action, rounds.Abandon):
            logger.warning("round %d: all participants are gone; waiting for clients", action.server_round)
        else:
            logger.info(
                "all %d rounds are done; manifest %d is the final model", self.config.rounds, action.server_round
            )

    @property
    def fold_due(self) -> bool:
        """Whether a closed round waits for `fold_pending`."""
        return self.state.phase is Phase.AGGREGATING

    def fold_pending(self) -> None:
        """Aggregate the closed round, if there is one. For one thread at a time; safe to repeat after any failure.

        Raises FoldCancelled when the run closes meanwhile, DiskFull and StorageError (try again later), and whatever
        the method raises.
        """
        if not self.fold_due:
            return
        started = time.monotonic()
        units, server_round = self.catalog.manifest.units, self.state.server_round
        updates = self.store.updates(server_round)
        paths = {update.client_id: self.uploads.updates / update.file_name for update in updates}
        plan = self._method.plan_merge([_contribution(update, paths[update.client_id]) for update in updates], units)
        changed = fold_round(
            *(units, plan, paths, self._blobs, self.backend), threads=self._fold_threads, cancelled=self._closing.is_set
        )
        with self.lock:
            for update in updates:
                survey, client = update.meta.survey, self.clients[update.client_id]
                client.survey = client.survey if survey is None else combined_survey(client.survey, survey)
            status = round_status(self.store.current_round(), updates, changed)
            next_phase = Phase.FINISHED if server_round >= self.policy.rounds else Phase.WAITING
            self.store.record_fold(status, changed, next_phase, self.clients.values())
            self.catalog.load(server_round + 1)
            self.apply(rounds.Folded(self.clock(), server_round))
        self._tidy(updates)
        logger.info(
            "round %d: %d of %d units changed, folded in %.2f s",
            *(server_round, len(changed), len(units), time.monotonic() - started),
        )

    def _tidy(self, folded: list[UpdateRecord]) -> None:
        """Delete what no round needs any more. What cannot be deleted now, the next start deletes."""
        try:
            self.uploads.delete_updates(folded)
            with self.lock:
                orphans = self.store.prune(self._keep_rounds)
                self.catalog.load_references()
            self._blobs.delete(orphans)
        except StorageError as fault:
            logger.warning("old rounds are not tidied up yet: %s", fault)

    # --- status -------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """What `edgefed status` shows."""
        with self.lock:
            return build_status(
                *(self.config, self.state, self.clients.values(), self.presence, self.store.history(), self.clock())
            )

    def all_heard(self, idle_s: float) -> bool:
        """Whether the run is over and every client knows: each has left, fallen silent, or was told and is quiet since.

        Quiet means that nothing was heard of it for ``idle_s``: it may still fetch the final model.
        """
        with self.lock:
            if self.state.phase is not Phase.FINISHED:
                return False
            now = self.clock()
            return all(
                self.presence.get(client_id, Presence()).heard_finished
                and now - self.state.last_seen[client_id] >= idle_s
                for client_id in self.state.live(now)
            )


def _contribution(update: UpdateRecord, path: Path) -> Contribution:
    if update.meta is None:
        raise StateCorrupt(f"the record of update {update.file_name} has no meta")
    reports = {(report.layer, report.expert): report for report in update.meta.experts}
    return Contribution(
        client_id=update.client_id, num_examples=update.meta.num_examples, experts=reports, units=update_units(path)
    )
