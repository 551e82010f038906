"""The Strategy of a ServerApp: edgefed's rounds, with Flower's messages instead of HTTP.

    node -> query.join -> client of the run
    assignment -> train, blobs -> blobs that are missing ... -> update -> round -> aggregation

Which clients train, when a round closes, which updates count and how they are combined is decided by the aggregator
that `edgefed serve` runs, on the same state folder. Each update goes to the disk as its reply arrives and is averaged
from there block by block, so memory holds one update, however many devices there are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgefed.api.server import Server
from edgefed.errors import (
    ChecksumMismatch,
    ConfigError,
    EdgefedError,
    NotFound,
    ProcessFailed,
    RoundClosed,
    StorageError,
    UpdateConflict,
)
from edgefed.flower import records
from edgefed.flower.nodes import FlowerAggregator, Node, expected_blobs, trainable_arrays
from edgefed.flower.tasks import END, JOIN, TRAIN, Ended, Introduction, RoundReply, RoundTask
from edgefed.protocol.messages import Assignment, Heartbeat, Manifest
from edgefed.tracking import RoundTrackers

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Result

logger = logging.getLogger("edgefed.flower")

POLL_S, NODES_S, TICK_S = 0.5, 3.0, 10.0
"""Seconds between two looks for replies, between two for nodes, and at most between two ticks of the run."""
DEFAULT_TIMEOUT_S = 3600.0
END_S = 15.0
"""Longest wait for the devices to hear that the run is over."""
MAX_FAILURES = 3
"""Failures in a row after which a node is asked no more."""
UPDATE_FILE = "flower-update.safetensors"


class ExpertStrategy:
    """Run edgefed's rounds on Flower's nodes, whose ClientApp is `make_client_app`.

    >>> strategy = ExpertStrategy(edgefed.Server(model="tiny", method="hfedmoe", rounds=3))   # doctest: +SKIP
    >>> result = strategy.start(grid)                                                          # doctest: +SKIP

    Args:
        server: Settings of the run. Those of the HTTP server (host, port, certificates, token) have no effect.
        message_bytes: Most bytes of blobs in one message; a device that needs more gets several.
        on_message: Gets lines about the import of the model.

    The run is in ``server.state``, as that of `edgefed serve`: it continues when the ServerApp is started again, and
    `edgefed export` reads the model from it.
    """

    def __init__(
        self,
        server: Server,
        *,
        message_bytes: int = 256 * 2**20,
        on_message: Callable[[str], None] | None = None,
    ):
        records.flower()
        from flwr.serverapp.strategy import Strategy

        Strategy.register(type(self))  # inheriting from it would need the package on import
        self.server = server
        self._message_bytes = message_bytes
        self._on_message = on_message or (lambda text: logger.info("%s", text))
        self._nodes: dict[int, Node] = {}
        self._sent: dict[str, Node] = {}
        self._timeout = DEFAULT_TIMEOUT_S
        self._aggregator: FlowerAggregator | None = None
        self._nodes_at = self._heard_at = 0.0

    def summary(self) -> None:
        """Log the run."""
        run = self.server.run_config
        if run is not None:
            logger.info("%s on %s, %d rounds, state in %s", run.method, run.model, run.rounds, self.server.state)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages that are due now: nodes join while a round runs, and are sent more than one message in it."""
        return [message for node in self._nodes.values() if (message := self._due(node)) is not None]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take replies as they come; aggregate the round if it is complete. (None, its metrics) if it was."""
        for reply in replies:
            self._take(reply)
        run = self._open.active
        run.tick()
        if not run.fold_due:
            return None, None
        run.fold_pending()
        history = run.status().history
        logger.info("round %d: aggregated %d updates", history[-1].server_round, history[-1].updates)
        return None, records.flower().MetricRecord(dict(history[-1].metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: a device measures the loss on its held-out text within its round."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, see `configure_evaluate`."""
        return None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds, or those that are left of a run that continues.

        Args:
            grid: Flower's nodes.
            initial_arrays: Not used: the model is the one of ``server``.
            num_rounds: Not used, or the rounds of ``server``.
            timeout: Seconds without any reply after which the run fails; also the lifetime of a message.
            train_config: Not used: a node takes nothing else from the server.
            evaluate_config: Not used.
            evaluate_fn: Evaluates the model before the first round and after each; it gets the trainable tensors,
                which then are all in memory.

        Returns the metrics of each round and, with ``evaluate_fn``, the arrays. Raises ConfigError, StorageError,
        StateCorrupt, and ProcessFailed if no node can go on.
        """
        from flwr.serverapp.strategy import Result

        if initial_arrays or train_config or evaluate_config:
            raise ConfigError(
                "ExpertStrategy takes no initial_arrays, train_config or evaluate_config",
                remedy="Set the model and its training in edgefed.Server.",
            )
        self._timeout = timeout
        trackers = RoundTrackers(self.server.track, "server", self._on_message)
        active = self.server.open_run(self._on_message, on_round=trackers.listener(), tick_s=TICK_S)
        result, app = Result(), records.flower()
        with trackers, FlowerAggregator(active) as self._aggregator:
            if num_rounds not in (None, active.config.rounds):
                raise ConfigError(f"num_rounds is {num_rounds}, the run has {active.config.rounds} rounds")
            self.summary()
            if evaluate_fn and active.state.server_round == 1:
                _evaluate(evaluate_fn, trainable_arrays(self._aggregator), 0, result)
            self._heard_at = time.monotonic()
            while not self._aggregator.finished:
                self._look_for_nodes(grid)
                server_round = active.state.server_round
                self._send(grid, self.configure_train(server_round, app.ArrayRecord(), app.ConfigRecord(), grid))
                _, metrics = self.aggregate_train(server_round, self._replies(grid))
                if metrics is not None:
                    result.train_metrics_clientapp[server_round] = metrics
                    if evaluate_fn:
                        _evaluate(evaluate_fn, trainable_arrays(self._aggregator), server_round, result)
                    continue
                self._check_alive()
                time.sleep(POLL_S)
            if evaluate_fn:
                result.arrays = trainable_arrays(self._aggregator)
            self._end(grid)
        self._aggregator = None
        return result

    # --- nodes ----------------------------------------------------------------------------------------------------

    @property
    def _open(self) -> FlowerAggregator:
        if self._aggregator is None:
            raise ConfigError("the run is not open", remedy="Call `start`, which opens it.")
        return self._aggregator

    def _look_for_nodes(self, grid: Grid) -> None:
        """Ask new nodes who they are, and mark the others as live."""
        if time.monotonic() - self._nodes_at < NODES_S:
            return
        self._nodes_at = time.monotonic()
        aggregator = self._open
        for node_id in grid.get_node_ids():
            node = self._nodes.setdefault(node_id, Node(node_id))
            if node.known:
                alive = Heartbeat(phase="training" if node.sent else "waiting", fraction=0.0, server_round=0)
                aggregator.service.heartbeat(node.client_id, aggregator.key_of(node.client_id), alive)

    def _message(self, node: Node, kind: str, body: Any, blobs: Mapping[str, Path] | None = None) -> Message:
        server_round = self._open.server_round
        content = records.pack(body, server_round, blobs)
        return records.flower().Message(
            content, dst_node_id=node.node_id, message_type=kind, ttl=self._timeout, group_id=str(server_round)
        )

    def _due(self, node: Node) -> Message | None:
        """The next message for a node, None while it works or has nothing to do."""
        aggregator = self._open
        if node.sent or node.given_up:
            return None
        if not node.known:
            return self._message(node, JOIN, Ended())
        wanted, node.missing = node.missing, ()
        if (assignment := aggregator.assignment(node.client_id)) is None:
            return None
        manifest = aggregator.manifest(assignment.server_round)
        if not wanted:
            node.attempt, wanted = node.attempt + 1, expected_blobs(node, aggregator, manifest, self._message_bytes)
        return self._task(node, assignment, manifest, wanted)

    def _task(self, node: Node, assignment: Assignment, manifest: Manifest, wanted: Iterable[str]) -> Message:
        """The round, with as many of the ``wanted`` blobs as one message may have."""
        aggregator, size_bytes = self._open, 0
        blobs: dict[str, Path] = {}
        for sha256 in wanted:
            path, blob_bytes = aggregator.service.blob(sha256)
            if blobs and size_bytes + blob_bytes > self._message_bytes:
                break
            blobs[sha256], size_bytes = path, size_bytes + blob_bytes
        aggregator.service.note_download(aggregator.key_of(node.client_id), size_bytes)
        task = RoundTask(
            run=aggregator.active.config, manifest=manifest, assignment=assignment, client_id=node.client_id,
            attempt=node.attempt,
        )  # fmt: skip
        return self._message(node, TRAIN, task, blobs)

    def _send(self, grid: Grid, messages: Iterable[Message]) -> None:
        for message in messages:  # one at a time: a message may have many bytes
            node = self._nodes[message.metadata.dst_node_id]
            node.sent = message.metadata.message_type
            for message_id in grid.push_messages([message]):
                self._sent[message_id] = node

    def _replies(self, grid: Grid) -> Iterable[Message]:
        """What has arrived; each reply is handled before the next one is fetched."""
        for message_id in list(self._sent):
            yield from grid.pull_messages([message_id])

    def _end(self, grid: Grid) -> None:
        """Let the devices' processes end. Whoever does not hear of it ends by itself later."""
        nodes = [node for node in self._nodes.values() if node.known]
        waiting = set(grid.push_messages([self._message(node, END, Ended()) for node in nodes]))
        until = time.monotonic() + END_S
        while waiting and time.monotonic() < until:
            time.sleep(POLL_S)
            waiting -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(waiting)}

    # --- replies --------------------------------------------------------------------------------------------------

    def _take(self, reply: Message) -> None:
        node = self._sent.pop(reply.metadata.reply_to_message_id)
        sent, node.sent = node.sent, ""
        self._heard_at = time.monotonic()
        try:
            if reply.has_error():
                raise ProcessFailed(f"Flower reports: {reply.error.reason}")
            if sent == JOIN:
                self._admit(node, records.unpack(reply.content, Introduction))
            else:
                self._advance(node, reply.content)
            node.failures = 0
        except (ChecksumMismatch, NotFound, RoundClosed, UpdateConflict) as error:
            logger.warning("node %d: its answer does not count: %s", node.node_id, error)
        except StorageError:
            raise
        except EdgefedError as error:
            self._fail(node, error)

    def _admit(self, node: Node, introduction: Introduction) -> None:
        if introduction.error is not None:
            node.given_up = introduction.error.message
            raise ProcessFailed(introduction.error.message)
        node.introduction = introduction
        self._register(node, introduction.num_examples)

    def _register(self, node: Node, num_examples: int) -> None:
        known = node.introduction
        assert known is not None, "the node has introduced itself"
        self._open.register(node.client_id, known.name, num_examples, known.memory_bytes, known.device)
        node.num_examples, node.known = num_examples, True

    def _advance(self, node: Node, content: Any) -> None:
        """Note what a device needs, or add its update to the round."""
        aggregator, reply = self._open, records.unpack(content, RoundReply)
        if reply.error is not None:
            node.given_up = reply.error.message
            raise ProcessFailed(reply.error.message)
        if reply.meta is None:
            node.missing = reply.missing
            return
        if reply.meta.num_examples > node.num_examples:  # examples are made from records of the data
            self._register(node, reply.meta.num_examples)
        path = aggregator.active.store.folder / UPDATE_FILE
        try:
            if records.store_update(content, path) != reply.meta.sha256:
                raise ChecksumMismatch("the update arrived with other content")
            node.resident = frozenset(reply.resident)
            aggregator.deliver(msgspec.structs.replace(reply.meta, client_id=node.client_id), path)
        finally:
            path.unlink(missing_ok=True)

    def _fail(self, node: Node, error: EdgefedError) -> None:
        """The node leaves the round; it joins again unless it has failed too often."""
        node.failures += 1
        if node.failures >= MAX_FAILURES:
            node.given_up = str(error)
        logger.error("node %d: %s%s", node.node_id, error, "; it is asked no more" if node.given_up else "")
        if node.known:
            node.known = False
            self._open.leave(node.client_id, str(error))

    def _check_alive(self) -> None:
        """Raise ProcessFailed if nothing can happen any more, or no reply has come for the timeout."""
        nodes = self._nodes.values()
        needed = self._open.active.policy.min_clients
        if nodes and all(node.given_up for node in nodes):
            reasons = dict.fromkeys(node.given_up for node in nodes)
            raise ProcessFailed(f"no node can take part: {'; '.join(reasons)}")
        if time.monotonic() - self._heard_at > self._timeout:
            working = sum(bool(node.sent) for node in nodes)
            raise ProcessFailed(
                f"no reply for {self._timeout:.0f} s: {len(nodes)} nodes, {working} of them at work, {needed} needed"
            )


def _evaluate(
    evaluate: Callable[[int, ArrayRecord], MetricRecord | None], arrays: ArrayRecord, server_round: int, result: Result
) -> None:
    if (metrics := evaluate(server_round, arrays)) is not None:
        result.evaluate_metrics_serverapp[server_round] = metrics
