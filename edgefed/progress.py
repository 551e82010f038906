"""Progress of a round: for the screen, for the heartbeat, and the seconds of each phase."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from edgefed.interrupt import StopRequested

IDLE_PHASE = "waiting"


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
