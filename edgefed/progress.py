"""Progress and interruption of a round: phases for the screen and the heartbeat, its line, and the request to stop.

One event, which the command line sets on Ctrl-C, ends every wait and every transfer. A blocking socket read does not
notice an event, so `run_interruptibly` runs the request in a daemon thread and watches both. An abandoned request ends
by itself: its next byte raises `StopRequested`, its socket times out, or the process exits.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

IDLE_PHASE = "waiting"
WATCH_S = 0.1
"""How often the stop event is checked during a request: the longest delay of Ctrl-C."""

T = TypeVar("T")


def counted(number: int, noun: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def round_range(first: int, last: int) -> str:
    """``round 3 was``, ``rounds 3 to 5 were``."""
    return f"round {first} was" if first >= last else f"rounds {first} to {last} were"


class StopRequested(Exception):
    """The agent was asked to stop. Not an error: the journal stays resumable."""


class ProgressSink(Protocol):
    """Where progress goes. The agent calls it from one thread at a time."""

    def phase(self, name: str, total: int | None = None, unit: str = "B") -> None:
        """A new phase begins: "download", "train", "upload", ... ``unit`` is "B" or "step"."""
        ...

    def advance(self, n: int) -> None:
        """``n`` more units of the current phase are done."""
        ...

    def message(self, text: str) -> None:
        """One line for the user."""
        ...

    def done(self) -> None:
        """The current phase is over."""
        ...


class Pulse:
    """Says that something still goes on: calls ``say(seconds)`` after 3 seconds, and then less and less often.

    A context; from a thread of its own, which ends with it.
    """

    TIMES_S = (3.0, 10.0, 30.0, 60.0)
    """Seconds after which it speaks; the last one is repeated."""

    def __init__(self, say: Callable[[float], None]) -> None:
        self._say = say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="edgefed-pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        started = time.monotonic()
        for due in itertools.chain(self.TIMES_S, itertools.count(2 * self.TIMES_S[-1], self.TIMES_S[-1])):
            if self._ended.wait(max(0.0, started + due - time.monotonic())):
                return
            self._say(time.monotonic() - started)


def remaining(done: float, total: float | None, seconds: float) -> str:
    """``about 40 s left`` after ``seconds`` in which ``done`` of ``total`` was done; without these, the time so far."""
    if not total or not 0 < done <= total:
        return f"{format_seconds(seconds)} so far"
    return f"about {format_seconds(seconds * (total - done) / done)} left"


class NullProgress:
    """Shows nothing."""

    def phase(self, name: str, total: int | None = None, unit: str = "B") -> None:
        """Show nothing."""

    def advance(self, n: int) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""

    def done(self) -> None:
        """Show nothing."""


class WatchedProgress:
    """Forwards to a sink, records phase, fraction and seconds per phase, and passes the stop request to the trainer.

    Thread-safe: downloads advance from several threads, the heartbeat reads from another. `advance` raises
    StopRequested once ``stop`` is set, so a trainer that advances after every step stops after the current one.
    """

    def __init__(self, sink: ProgressSink, stop: threading.Event, clock: Callable[[], float] = time.monotonic) -> None:
        self._sink = sink
        self._stop = stop
        self._clock = clock
        self._lock = threading.Lock()
        self._name = IDLE_PHASE
        self._total: int | None = None
        self._count = 0
        self._started = clock()
        self._seconds: dict[str, float] = {}

    def phase(self, name: str, total: int | None = None, unit: str = "B") -> None:
        """A new phase begins."""
        with self._lock:
            self._close()
            self._name, self._total, self._count = name, total, 0
            self._sink.phase(name, total, unit)

    def advance(self, n: int) -> None:
        """``n`` more units are done. Raises StopRequested once ``stop`` is set."""
        if self._stop.is_set():
            raise StopRequested
        with self._lock:
            self._count += n
            self._sink.advance(n)

    def message(self, text: str) -> None:
        """One line for the user."""
        with self._lock:
            self._sink.message(text)

    def done(self) -> None:
        """The current phase is over."""
        with self._lock:
            if self._name == IDLE_PHASE:
                return
            self._close()
            self._name, self._total, self._count = IDLE_PHASE, None, 0
            self._sink.done()

    def snapshot(self) -> tuple[str, float]:
        """(current phase, its fraction in 0..1); the fraction is 0 if the total is unknown."""
        with self._lock:
            return self._name, min(1.0, self._count / self._total) if self._total else 0.0

    def take_seconds(self) -> dict[str, float]:
        """Seconds per phase since the last call, rounded to milliseconds, without the time between phases."""
        with self._lock:
            self._close()
            seconds, self._seconds = self._seconds, {}
            return {name: round(value, 3) for name, value in seconds.items()}

    def _close(self) -> None:
        now = self._clock()
        if self._name != IDLE_PHASE:
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._started
        self._started = now


class RoundLines:
    """One line for each round of a device, with the time that it takes and the wait that is to be expected.

    ``round 2/5: train 4.74, held-out 4.61 -> 4.48, 12 s, next in about 40 s``
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: tuple[int, float] | None = None
        self._ended: float | None = None
        self._wait_s: float | None = None

    def begin(self, server_round: int) -> None:
        """The device starts to work on a round."""
        now = self._clock()
        if self._ended is not None:
            self._wait_s = now - self._ended
        self._began, self._ended = (server_round, now), None

    def end(self, server_round: int, rounds: int, metrics: Mapping[str, float]) -> str:
        """The line of a round whose update was acknowledged. A round that another process began has no time."""
        now = self._clock()
        seconds = now - self._began[1] if self._began is not None and self._began[0] == server_round else None
        self._ended = now
        line = round_line(server_round, rounds, metrics, seconds)
        if self._wait_s is None or self._wait_s < 1 or server_round >= rounds:
            return line
        return f"{line}, next in about {format_seconds(self._wait_s)}"


def round_line(server_round: int, rounds: int, metrics: Mapping[str, float], seconds: float | None, *more: str) -> str:
    """One line about a finished round: its losses, ``more`` in between, and its time."""
    parts = [*filter(None, [format_losses(metrics)]), *more]
    if seconds is not None:
        parts.append(format_seconds(seconds))
    return f"round {server_round}/{rounds}: {', '.join(parts) or 'done'}"


def format_losses(metrics: Mapping[str, float]) -> str:
    """``train 4.74, held-out 4.61 -> 4.48`` from the metrics of a round; empty without any. Losses are in nats."""
    parts = []
    if (train := metrics.get("train_loss")) is not None:
        parts.append(f"train {train:.2f}")
    before, after = metrics.get("held_out_loss_before"), metrics.get("held_out_loss_after")
    if before is not None and after is not None:
        parts.append(f"held-out {before:.2f} -> {after:.2f}")
    if (accuracy := metrics.get("held_out_accuracy_after")) is not None:
        parts.append(f"held-out accuracy {100 * accuracy:.1f} %")
    return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """``0.4 s``, ``95 s``, ``12.5 min``, ``3.2 h``."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a process to stop: SIGINT, SIGTERM, and SIGHUP unless it is ignored, as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)  # missing on Windows
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN:
        return signal.SIGINT, signal.SIGTERM
    return signal.SIGINT, signal.SIGTERM, hangup


def pause(seconds: float, stop: threading.Event) -> None:
    """Wait ``seconds``. Raises StopRequested as soon as ``stop`` is set."""
    if stop.wait(seconds):
        raise StopRequested


def run_interruptibly(request: Callable[[], T], stop: threading.Event) -> T:
    """Return ``request()``, or raise what it raises. Raises StopRequested within `WATCH_S` after ``stop`` is set."""
    if stop.is_set():
        raise StopRequested
    results: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            results.append(request())
        except BaseException as error:  # raised again in the caller's thread, whatever it is
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=work, name="edgefed-request", daemon=True).start()
    while not ended.wait(WATCH_S):
        if stop.is_set():
            raise StopRequested
    if errors:
        raise errors[0]
    return results[0]
