"""The loop of a device: register, ask for work, train, deliver, repeat. It survives every loss of the network.

    register -> ask -> Wait        sleep, ask again
                    -> Assignment  manifest -> trainer -> journal -> upload -> commit -> delete the update
                    -> Finished    return

The trainer is an argument and the only part that knows a model. An update is deleted only after the server has
acknowledged it; a restarted process delivers the update in its journal before it asks for new work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeVar

from edgefed import __version__
from edgefed.agent.backoff import Retry, never_reached
from edgefed.agent.cache import BlobCache, Item
from edgefed.agent.compression import UpdateCompressor
from edgefed.agent.delivery import MAX_REFUSALS, Delivered, Delivery
from edgefed.agent.finish import COMPARISON_PATIENCE_S, compare_at_end
from edgefed.agent.heartbeat import Copies, HeartbeatThread
from edgefed.agent.journal import Journal
from edgefed.agent.summary import RunSummary
from edgefed.agent.transport import AggregatorClient
from edgefed.errors import ChecksumMismatch, EdgefedError, NotFound, RoundClosed, ServerUnreachable, UnknownClient
from edgefed.progress import (
    NullProgress,
    ProgressSink,
    RoundLines,
    StopRequested,
    WatchedProgress,
    counted,
    run_interruptibly,
)
from edgefed.protocol import PROTOCOL_VERSION
from edgefed.protocol.comparison import Comparison
from edgefed.protocol.messages import (
    Assignment,
    DeviceInfo,
    Finished,
    Heartbeat,
    Register,
    RunConfig,
)
from edgefed.protocol.trainer import Trainer

logger = logging.getLogger("edgefed.agent")

BLOBS_FOLDER = "blobs"
STOPPED = "stopped by its user"
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.05, 60.0
"""Limits on the pause between two requests for work, which the server asks for."""

T = TypeVar("T")
StepKind = Literal["waited", "accepted", "dropped", "unregistered", "finished"]


@dataclasses.dataclass(frozen=True)
class AgentSettings:
    """What this device reports to the server, and its time-outs; seconds and bytes."""

    name: str
    memory_bytes: int
    expert_share: float = 1.0
    compute_share: float = 1.0
    device: DeviceInfo | None = None
    budget_bytes: Callable[[], int | None] = lambda: None
    """Returns the newest measured memory budget; called from the heartbeat's thread."""
    poll_s: float = 20.0
    """Longest time for which the server may hold a request for work."""
    give_up_after_s: float | None = 60.0
    """Time limit of the first registration. A device that has joined before never gives up."""
    leave_s: float = 2.0
    """Time limit of the goodbye."""
    final_evaluation: str = "never"
    """Whether the final model is compared with others at the end, one of `finish.EVALUATIONS`."""


@dataclasses.dataclass(frozen=True)
class StepOutcome:
    """Result of one `Agent.step`. ``detail``: the server's reason, or the error that dropped an update."""

    kind: StepKind
    server_round: int = 0
    detail: str = ""


class Agent:
    """One device in one run. `run` loops until the run is over or ``stop`` is set; `step` is one iteration.

    Call from one thread. Raises Unauthorized, VersionMismatch, ServerUnreachable (only before the device has joined),
    StorageError, the errors of the trainer, and the server's refusal at the third in a row.
    """

    def __init__(
        self,
        settings: AgentSettings,
        trainer: Trainer,
        *,
        client: AggregatorClient,
        journal: Journal,
        cache: BlobCache,
        progress: ProgressSink | None = None,
        stop: threading.Event | None = None,
        retry: Retry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``retry`` has its own schedule, randomness and sleep; it must watch the same ``stop``."""
        self._settings = settings
        self._trainer = trainer
        self.client = client
        self.journal = journal
        self._cache = cache
        self._stop = stop or threading.Event()
        self._clock = clock
        self.progress = WatchedProgress(progress or NullProgress(), self._stop, clock)
        self._retry = retry or Retry(self._stop, clock=clock)
        self._delivery = Delivery(client, journal, self._retry, self.progress, self._call)
        self._compressor = UpdateCompressor(journal, cache.path, self.progress.message)
        self._run: RunConfig | None = None
        self._joined = journal.knows(client.base_url)
        self._num_examples = trainer.num_examples
        self._heartbeat: HeartbeatThread | None = None
        self._copies = Copies(cache.path, client.restore)
        self._server_round = journal.record.server_round
        self._forgotten = self._rounds = self._run_rounds = 0
        self._metrics: Mapping[str, float] = {}
        self._wait_reason = ""
        self._asked = False
        self._comparison: Comparison | None = None
        self._started = clock()
        self._lines = RoundLines(clock)

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the heartbeats. The caller closes client and journal."""
        if self._heartbeat:
            self._heartbeat.close()
            self._heartbeat = None

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> RunSummary:
        """Take part until the run is over or ``stop`` is set. Unless the run is over, report leaving to the server."""
        try:
            while True:
                outcome = self.step()
                if outcome.kind == "finished":
                    return self._summary(finished=True, reason=outcome.detail)
        except StopRequested:
            self.leave(STOPPED)
            return self._summary(finished=False, reason="stopped")
        except (KeyboardInterrupt, SystemExit):
            self.leave(STOPPED)
            raise
        except BaseException as error:
            self.leave(error.code if isinstance(error, EdgefedError) else f"internal error ({type(error).__name__})")
            raise
        finally:
            self.close()

    def step(self) -> StepOutcome:
        """Deliver the update of an earlier process, or ask for work and do it. Registers first if necessary.

        Raises StopRequested when ``stop`` is set; the journal then has what the next process needs to continue.
        """
        try:
            if self._run is None:
                self._register()
            if self.journal.pending is not None:
                return self._close_round(self._delivery.resume())
            # The server answers the first request at once: the user hears what the device waits for.
            poll_s = self._settings.poll_s if self._asked else 0.0
            reply = self._call(lambda: self.client.assignment(poll_s))
            self._asked = True
            if isinstance(reply, Assignment):
                return self._close_round(self._take_part(reply))
        except UnknownClient as error:
            return self._start_over(error)
        if isinstance(reply, Finished):
            assert self._run is not None, "not registered"
            self._comparison = compare_at_end(
                self._trainer, self._run, reply.server_round, self.client, self._cache,
                functools.partial(self._fetch, give_up_after_s=COMPARISON_PATIENCE_S), self.progress,
                self._settings.final_evaluation,
            )  # fmt: skip
            return StepOutcome("finished", reply.server_round, reply.reason)
        if reply.reason != self._wait_reason:
            self._wait_reason = reply.reason
            self.progress.message(reply.reason)
        # Never poll in a tight loop, not even a server that answers at once and asks for no pause.
        self._retry.sleep(min(max(reply.retry_after_s, SHORTEST_WAIT_S), LONGEST_WAIT_S))
        return StepOutcome("waited", self._server_round, reply.reason)

    def leave(self, reason: str) -> None:
        """Tell the server that the device leaves, unless that takes too long. A later `step` registers again."""
        self.close()  # a heartbeat after the goodbye would count as a return
        if self._run is None:
            return
        self._run = None
        try:
            self.client.leave(reason, timeout_s=self._settings.leave_s)
        except EdgefedError as error:
            logger.debug("could not report to the server that this device leaves: %s", error)

    def _summary(self, *, finished: bool, reason: str) -> RunSummary:
        return RunSummary(
            rounds=self._rounds, rounds_of_run=self.journal.rounds_done(), run_rounds=self._run_rounds,
            bytes_down=self.client.bytes_down, bytes_up=self.client.bytes_up,
            seconds=self._clock() - self._started, metrics=self._metrics, finished=finished, reason=reason,
            comparison=self._comparison,
        )  # fmt: skip

    # --- registration and requests --------------------------------------------------------------------------------

    def _register(self, num_examples: int = 0) -> None:
        """Register, or register again: an update may not have more examples than its client has registered."""
        record, settings = self.journal.record, self._settings
        pending = self.journal.pending.num_examples if self.journal.pending else 0
        self._num_examples = max(num_examples, pending, self._num_examples)
        message = Register(
            protocol_version=PROTOCOL_VERSION, client_id=record.client_id, client_key=record.client_key,
            name=settings.name, memory_bytes=settings.memory_bytes, expert_share=settings.expert_share,
            compute_share=settings.compute_share, num_examples=self._num_examples,
            edgefed_version=__version__, device=settings.device, instance=self.client.instance,
        )  # fmt: skip
        limit = None if self._joined else settings.give_up_after_s
        try:
            registered = self._call(lambda: self.client.register(message), give_up_after_s=limit, until_answered=True)
        except ServerUnreachable as error:
            raise never_reached(error, self.client.base_url, settings.give_up_after_s) from error
        run = registered.run
        if not self._joined:
            self.progress.message(f"joined: {run.method} on {run.model}, {counted(run.rounds, 'round')}")
        self.journal.bind(self.client.base_url, run.run_id)
        self._run, self._joined, self._run_rounds = run, True, run.rounds
        if self._heartbeat is None:
            self._heartbeat = HeartbeatThread(self._send_heartbeat, registered.heartbeat_s)
        self._heartbeat.interval_s = registered.heartbeat_s

    def _start_over(self, error: UnknownClient) -> StepOutcome:
        """Register again and keep the work. Raises ``error`` if registering does not help."""
        self._run = None
        self._forgotten += 1
        if self._forgotten >= MAX_REFUSALS:
            raise error
        self.progress.message("the server no longer knows this device; registering again")
        self._retry.wait(self._forgotten)
        return StepOutcome("unregistered", self._server_round, str(error))

    def _send_heartbeat(self) -> None:
        phase, fraction = self.progress.snapshot()
        message = Heartbeat(
            phase=phase, fraction=fraction, server_round=self._server_round, budget_bytes=self._settings.budget_bytes()
        )
        self._copies.offer(self.client.heartbeat(message).wanted)

    def _call(
        self, request: Callable[[], T], give_up_after_s: float | None = None, *, until_answered: bool = False
    ) -> T:
        """Repeat ``request`` until it succeeds. Report the first failure of each kind, and the success after it."""
        reported = ""

        def report(error: EdgefedError, left_s: float | None) -> None:
            nonlocal reported
            if error.code != reported:
                how_long = "until it works" if left_s is None else f"for {give_up_after_s:.0f} s"
                self.progress.message(f"{error}; retrying {how_long}")
            reported = error.code

        result = self._retry.run(
            lambda: run_interruptibly(request, self._stop),
            joined=self._joined,
            give_up_after_s=give_up_after_s,
            until_answered=until_answered,
            on_wait=report,
        )
        if reported:
            self.progress.message("connected again" if self._joined else "connected")
        return result

    # --- one round ------------------------------------------------------------------------------------------------

    def _take_part(self, assignment: Assignment) -> Delivered:
        assert self._run is not None, "not registered"
        self._server_round = assignment.server_round
        self._lines.begin(assignment.server_round)
        self._delivery.open_account()
        self.journal.begin_training(assignment.server_round)
        path = self.journal.update_path()
        try:
            manifest = self._call(lambda: self.client.manifest(assignment.server_round))
            if manifest.run_id != self._run.run_id:
                raise UnknownClient(f"the server now has run {manifest.run_id!r}, not {self._run.run_id!r}")
            trained = self._trainer.train_round(self._run, manifest, assignment, self._fetch, self.progress, path)
        except (NotFound, RoundClosed) as error:
            return self._delivery.drop(error)  # the server moved on during the download
        except ChecksumMismatch as error:
            return self._delivery.refuse(error)
        self.progress.done()
        if trained.num_examples > self._num_examples:  # known only now: examples are made from records of the data
            self._register(trained.num_examples)
        more = self._compressor.compress(
            self._run.compression, manifest, trained, path, self.client.rates.up_bytes_per_s
        )
        meta = self._delivery.describe(trained, more, path)
        self.journal.finish_training(
            path, meta, bytes_down=self._delivery.bytes_down, seconds=self.progress.take_seconds()
        )
        self._cache.prune(trained.keep)
        return self._delivery.deliver()

    def _close_round(self, delivered: Delivered) -> StepOutcome:
        if delivered.error is not None:
            return StepOutcome("dropped", delivered.server_round, str(delivered.error))
        self._rounds, self._forgotten = self._rounds + 1, 0
        self._metrics = delivered.metrics
        if self._run is not None:
            self.progress.message(self._lines.end(delivered.server_round, self._run.rounds, delivered.metrics))
        try:
            self._trainer.between_rounds(self._fetch, self.progress)
        except (NotFound, RoundClosed) as error:
            logger.info("not prepared for the next round: %s", error)  # the server moved on; done within the round
        return StepOutcome("accepted", delivered.server_round)

    def _fetch(self, items: Iterable[Item], give_up_after_s: float | None = None) -> Mapping[str, Path]:
        items = tuple(items)
        self._compressor.note_slices(items)

        def ensure() -> dict[str, Path]:
            missing_bytes = self._cache.bytes_to_download(items)
            if missing_bytes:
                self.progress.phase("download", missing_bytes, "B")
            return self._cache.ensure(items, self._delivery.count_download)

        blobs = self._call(ensure, give_up_after_s)
        if self.progress.snapshot()[0] == "download":
            self.progress.done()
        return blobs


@contextlib.contextmanager
def open_agent(
    server: str,
    state: Path | str,
    settings: AgentSettings,
    trainer: Trainer,
    *,
    token: str | None = None,
    invitation: str = "",
    verify: ssl.SSLContext | bool = True,
    progress: ProgressSink | None = None,
    stop: threading.Event | None = None,
    retry: Retry | None = None,
    new_identity: bool = False,
) -> Iterator[Agent]:
    """Open an agent with its client, journal and cache in the folder ``state``, and close them at the end.

    ``new_identity``: join as a new client, for a folder that was copied from another device. Raises ConfigError for an
    invalid address or token, StateLocked, StateCorrupt, StorageError.
    """
    with Journal(state) as journal:
        if new_identity:
            journal.renew_identity()
        record = journal.record
        with AggregatorClient(
            server, record.client_id, record.client_key, token,
            device_key=record.device_key, invitation=invitation, verify=verify,
        ) as client:  # fmt: skip
            cache = BlobCache(journal.folder / BLOBS_FOLDER, client)
            with Agent(
                settings, trainer, client=client, journal=journal, cache=cache, progress=progress, stop=stop,
                retry=retry,
            ) as agent:  # fmt: skip
                yield agent
