"""Trackers of experiments: the metrics of each round in TensorBoard, Weights & Biases, MLflow, or a JSON Lines file.

    round -> RoundTrackers.record -> queue -> a thread and a process for each tracker

A tracker runs in a process of its own. One that raises, dies or hangs is reported once and gets nothing more; training
never waits for it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgefed.config import Setting
from edgefed.errors import ConfigError
from edgefed.isolation.worker import Worker
from edgefed.protocol.messages import RoundStatus, RunConfig

PACKAGES = {"json": "", "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Kind of a tracker -> the package that it needs, which is also the name of the extra; "" for none."""
FORMS = "json:FILE, tensorboard:DIR, wandb:offline, wandb:online, mlflow:DIR or mlflow:http://HOST"
TRACK = Setting(
    "Also record the metrics of each round with json:FILE, tensorboard:DIR, wandb:offline, wandb:online, or "
    "mlflow:DIR_OR_URL; repeatable.", metavar="TRACKER",
)  # fmt: skip
"""The setting `track` of a client and of a server."""
OPEN_S, CALL_S, CLOSE_S = 120.0, 60.0, 60.0
"""Time limits of a tracker: to start, to record a round, to finish."""
MAX_WAITING = 1000
"""Rounds that may wait for a slow tracker; it gets nothing more than these."""


def check_trackers(specs: Sequence[str]) -> tuple[str, ...]:
    """``specs``. Raises ConfigError for a tracker that does not exist or whose package is not installed."""
    if isinstance(specs, str):
        raise ConfigError(f"`track` is {specs!r}, expected a list of trackers", remedy=f"Use [{specs!r}].")
    for spec in specs:
        kind, _, where = spec.partition(":")
        if kind not in PACKAGES or not where or (kind == "wandb" and where not in ("offline", "online")):
            raise ConfigError(f"invalid tracker {spec!r}", remedy=f"Use one of {FORMS}.")
        package = PACKAGES[kind]
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracker {kind!r} needs the package {package}", remedy=f"Run `pip install 'edgefed[{kind}]'`."
            )
    return tuple(specs)


def tracked_run(run: RunConfig) -> dict[str, Any]:
    """What a tracker is told of a run."""
    names = ("run_id", "model", "method", "rounds", "seed")
    return {**{name: getattr(run, name) for name in names}, **run.method_options}


class RoundTrackers:
    """Hands the metrics of rounds to trackers. A context; leaving it waits for them, but not for long.

    Args:
        specs: Trackers, as `check_trackers` takes them.
        name: Name of this process's runs in the trackers: the device's, or "server".
        on_message: Gets one line about a tracker that fails. Called from a thread.
    """

    def __init__(self, specs: Sequence[str], name: str, on_message: Callable[[str], None]):
        check_trackers(specs)
        self._threads = [_TrackerThread(spec, name, on_message) for spec in specs]

    def __enter__(self) -> RoundTrackers:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.finish()
        until = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.end(max(0.0, until - time.monotonic()))

    def listener(
        self, on_round: Callable[[RoundStatus], None] | None = None
    ) -> Callable[[RunConfig, RoundStatus], None]:
        """A function that records a round of a server, and then calls ``on_round``."""

        def listen(run: RunConfig, status: RoundStatus) -> None:
            numbers = ("participants", "updates", "seconds", "uploaded_bytes", "downloaded_bytes", "experts_changed")
            spent = {} if status.privacy is None else {"epsilon": status.privacy.epsilon}
            metrics = {**{name: getattr(status, name) for name in numbers}, **spent, **status.metrics}
            self.record(tracked_run(run), status.server_round, metrics)
            if on_round is not None:
                on_round(status)

        return listen

    def record(self, run: Mapping[str, Any], server_round: int, metrics: Mapping[str, float]) -> None:
        """Record a round of ``run``, which has a ``run_id``. Never blocks or raises; leaves out what is not finite."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for thread in self._threads:
            thread.put(dict(run), server_round, finite)


class _TrackerThread(threading.Thread):
    """Feeds one tracker's process."""

    def __init__(self, spec: str, name: str, on_message: Callable[[str], None]):
        super().__init__(name=f"edgefed-track-{spec.partition(':')[0]}", daemon=True)
        self._spec, self._run_name, self._on_message = spec, name, on_message
        self._queue: queue.Queue[tuple[dict[str, Any], int, dict[str, float]] | None] = queue.Queue(MAX_WAITING)
        self._worker = Worker({"WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"})
        self._dropped = False
        self.start()

    def put(self, *entry: Any) -> None:
        """Hand over a round, unless the tracker has been dropped."""
        if not self._dropped:
            try:
                self._queue.put_nowait(entry)
            except queue.Full:
                self._drop(f"it is {MAX_WAITING} rounds behind")

    def finish(self) -> None:
        """Ask the tracker to end after what it has."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._dropped = True

    def end(self, patience_s: float) -> None:
        """Wait for the end, then end the tracker's process."""
        self.join(patience_s)
        if self.is_alive():
            self._drop(f"it did not finish within {CLOSE_S:.0f} s")
        self._worker.close()

    def run(self) -> None:
        """Open the tracker with the first round, and pass on each round."""
        is_open = False
        while (entry := self._queue.get()) is not None and not self._dropped:
            run, server_round, metrics = entry
            if not is_open:
                self._call("open_tracker", OPEN_S, spec=self._spec, name=self._run_name, run=run)
                is_open = True
            self._call("log_round", CALL_S, server_round=server_round, metrics=metrics)
        if is_open:
            self._call("close_tracker", CLOSE_S)

    def _call(self, function: str, limit_s: float, **arguments: object) -> None:
        if self._dropped:
            return
        try:
            outcome = self._worker.call(f"edgefed.tracking:{function}", limit_s, **arguments)
        except ValueError:  # `end` has closed the process meanwhile, and reported it
            return
        if not outcome.ok:
            self._drop(outcome.failure)

    def _drop(self, reason: str) -> None:
        if not self._dropped:
            self._dropped = True
            self._on_message(f"tracker {self._spec} gets no more metrics: {reason}")


# --- in the tracker's process ---------------------------------------------------------------------------------------

_log: Callable[[int, Mapping[str, float]], object] | None = None
_close: Callable[[], object] | None = None


def open_tracker(spec: str, name: str, run: Mapping[str, Any]) -> None:
    """Open a tracker in this process, for `log_round`."""
    global _log, _close
    kind, _, where = spec.partition(":")
    makers = {"json": _json_lines, "tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    _log, _close = makers[kind](where, name, run)


def log_round(server_round: int, metrics: Mapping[str, float]) -> None:
    """Record one round with the tracker that is open."""
    assert _log is not None, "a tracker is open"
    _log(server_round, metrics)


def close_tracker() -> None:
    """Finish what the tracker still has to write."""
    assert _close is not None, "a tracker is open"
    _close()


_Tracker = tuple[Callable[[int, Mapping[str, float]], object], Callable[[], object]]
"""Records a round; finishes."""


def _json_lines(where: str, name: str, run: Mapping[str, Any]) -> _Tracker:
    path = Path(where).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8", buffering=1)

    def log(server_round: int, metrics: Mapping[str, float]) -> None:
        line = {"time": time.time(), "run_id": run["run_id"], "name": name, "server_round": server_round}
        file.write(json.dumps({**line, "metrics": metrics}) + "\n")

    return log, file.close


def _tensorboard(where: str, name: str, run: Mapping[str, Any]) -> _Tracker:
    """Event files, written by tensorboard itself: its writer in torch would load torch."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(Path(where).expanduser() / f"{run['run_id']}-{_plain(name)}"))

    def log(server_round: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        writer.add_event(Event(wall_time=time.time(), step=server_round, summary=Summary(value=values)))
        writer.flush()

    return log, writer.close


def _wandb(where: str, name: str, run: Mapping[str, Any]) -> _Tracker:
    """Project, entity and folder are those of WANDB_PROJECT, WANDB_ENTITY and WANDB_DIR."""
    import os

    import wandb

    tracked = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "edgefed"), id=f"{run['run_id']}-{_plain(name)}", resume="allow",
        name=name, group=run["run_id"], config=dict(run), mode=where,
    )  # fmt: skip

    def log(server_round: int, metrics: Mapping[str, float]) -> None:
        tracked.log(dict(metrics), step=server_round)

    return log, tracked.finish


def _mlflow(where: str, name: str, run: Mapping[str, Any]) -> _Tracker:
    """``where`` is a tracking URI, or a folder for MLflow's files; the experiment is "edgefed"."""
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    uri = where
    if "://" not in where:
        folder = Path(where).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        uri = folder.as_uri()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("edgefed")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("edgefed")
    found = client.search_runs(
        [experiment_id], f"tags.run_id = '{_plain(run['run_id'])}' and tags.device = '{_plain(name)}'"
    )
    tags = {"run_id": run["run_id"], "device": _plain(name)}
    tracked = found[0] if found else client.create_run(experiment_id, tags=tags, run_name=name)
    tracked_id = tracked.info.run_id
    if not found:
        client.log_batch(tracked_id, params=[Param(key, str(value)) for key, value in run.items()])

    def log(server_round: int, metrics: Mapping[str, float]) -> None:
        now_ms = int(1000 * time.time())
        client.log_batch(tracked_id, [Metric(key, value, now_ms, server_round) for key, value in metrics.items()])

    return log, lambda: client.set_terminated(tracked_id)


def _plain(name: str) -> str:
    """``name`` with only what file names and identifiers may have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
