"""A device's rounds: the trainer in a thread that waits for blobs, and the requests that bring them.

`RoundWorker.work` returns whenever the trainer needs blobs that are not in the cache, and when it has trained. The
trainer keeps its model between rounds, and its place within one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from edgefed.agent.agent import BLOBS_FOLDER
from edgefed.agent.cache import BlobCache, Item
from edgefed.agent.journal import Journal
from edgefed.api.client import Client
from edgefed.disk import hash_file
from edgefed.errors import EdgefedError, NotFound, first_line
from edgefed.flower.records import NoSource
from edgefed.flower.tasks import Introduction, RoundReply, RoundTask, failed
from edgefed.join import open_trainer
from edgefed.progress import StopRequested, WatchedProgress
from edgefed.protocol.limits import check_manifest, check_run
from edgefed.protocol.messages import FileInfo, UnitInfo, UpdateMeta
from edgefed.protocol.slices import UnitSlice

logger = logging.getLogger("edgefed.flower")

UPDATE_FILE = "round.safetensors"


class RoundWorker:
    """Trains the rounds of one device. A context; keeps the state folder locked while it is open.

    ``settings``: of the device; its server is not used. Raises DataError, ConfigError, BudgetTooSmall and StateLocked.
    """

    def __init__(self, settings: Client):
        sink = _LogProgress()
        self._undo = contextlib.ExitStack()
        try:
            self._journal = self._undo.enter_context(Journal(settings.state))
            settings.check_data()
            # The final model is compared by nobody: a Flower run has no request for it.
            config = dataclasses.replace(settings.load(settings.memory_bytes, sink), final_evaluation="never")
            self._trainer, memory = self._undo.enter_context(open_trainer(config, sink))
        except BaseException:
            self._undo.close()
            raise
        self._memory, self._name = memory, config.name
        self._cache = BlobCache(self._journal.folder / BLOBS_FOLDER, NoSource())
        self._path = self._journal.updates / UPDATE_FILE
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._progress = WatchedProgress(sink, self._ended)
        self._thread: threading.Thread | None = None
        self._round: tuple[str, int] | None = None
        self._reply: RoundReply | None = None
        """What `work` returns next; None while the trainer works."""
        self._may_ask = False

    def __enter__(self) -> RoundWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_round()
        self._undo.close()

    def introduce(self) -> Introduction:
        """What the server learns of this device."""
        return Introduction(
            name=self._name, memory_bytes=self._memory.first_bytes, num_examples=self._trainer.num_examples,
            device=self._memory.describe(),
        )  # fmt: skip

    def work(self, task: RoundTask) -> RoundReply:
        """Begin the round, or go on with the blobs that have arrived in the cache; call from one thread at a time.

        Returns when blobs are missing, when the round is trained, or with the error that ended it.
        """
        try:
            check_run(task.run)
            check_manifest(task.manifest)
        except EdgefedError as error:
            return failed(error)
        this = task.run.run_id, task.assignment.server_round
        if self._round != this or (self._reply is not None and self._reply.status == "failed"):
            self._end_round()
            self._round, self._reply = this, None
            self._thread = threading.Thread(target=self._train, args=(task,), name="edgefed-round", daemon=True)
            self._thread.start()
        with self._changed:
            if self._reply is not None and self._reply.status == "needs":
                self._reply = None
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._reply is not None)
            reply = self._reply
        assert reply is not None, "just waited for"
        if reply.meta is None:
            return reply
        meta = msgspec.structs.replace(reply.meta, client_id=task.client_id, attempt=task.attempt)
        return msgspec.structs.replace(reply, meta=meta)

    # --- the thread of the trainer --------------------------------------------------------------------------------

    def _train(self, task: RoundTask) -> None:
        self._may_ask = True
        try:
            trained = self._trainer.train_round(
                task.run, task.manifest, task.assignment, self._fetch, self._progress, self._path
            )
            sha256, size_bytes = hash_file(self._path)
            meta = UpdateMeta(
                client_id=task.client_id, server_round=task.assignment.server_round, attempt=task.attempt,
                sha256=sha256, size_bytes=size_bytes, num_examples=trained.num_examples,
                num_tokens=trained.num_tokens, experts=trained.experts, survey=trained.survey,
                lora_rank=trained.lora_rank,
                metrics={name: float(value) for name, value in trained.metrics.items() if math.isfinite(value)},
            )  # fmt: skip
            self._cache.prune(trained.keep)
        except StopRequested:
            return
        except EdgefedError as error:
            self._answer(failed(error))
            return
        except Exception as error:
            logger.exception("the round failed")
            text = f"internal error ({type(error).__name__}): {first_line(error)}"
            self._answer(failed(EdgefedError(text, remedy="See the device's log.")))
            return
        self._may_ask = False
        self._answer(
            RoundReply(status="trained", meta=meta, resident=tuple(sorted(trained.keep)), update=str(self._path))
        )
        try:
            self._trainer.between_rounds(self._fetch, self._progress)
        except (EdgefedError, StopRequested) as error:
            logger.info("not prepared for the next round: %s", error)

    def _fetch(self, items: Iterable[UnitInfo | FileInfo | UnitSlice]) -> Mapping[str, Path]:
        """The files of ``items``; waits until a request has brought what is missing. Slices are cut here."""
        items = tuple(items)
        wholes: list[Item] = [
            item.unit if isinstance(item, UnitSlice) and not self._cache.path(item.sha256).exists() else item
            for item in items
        ]
        while missing := tuple(sorted(self._cache.missing(wholes))):
            if not self._may_ask:
                raise NotFound(f"{len(missing)} blobs are not on this device between two rounds")
            with self._changed:
                self._reply = RoundReply(status="needs", missing=missing)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._reply is None or self._ended.is_set())
            if self._ended.is_set():
                raise StopRequested
        return self._cache.ensure(items)

    def _answer(self, reply: RoundReply) -> None:
        with self._changed:
            self._reply = reply
            self._changed.notify_all()

    def _end_round(self) -> None:
        """Stop the thread; a step in progress ends first."""
        if self._thread is None:
            return
        if self._may_ask:  # not while it prepares the next round
            with self._changed:
                self._ended.set()
                self._changed.notify_all()
        self._thread.join()
        self._ended.clear()
        self._thread = None


class _LogProgress:
    """Writes phases and messages to the log."""

    def phase(self, name: str, total: int | None = None, unit: str = "B") -> None:
        """Log the start of a phase."""
        logger.info("%s", name)

    def advance(self, n: int) -> None:
        """Log nothing: a step is too little."""

    def message(self, text: str) -> None:
        """Log a line."""
        logger.info("%s", text)

    def done(self) -> None:
        """Log nothing."""
