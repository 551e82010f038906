"""How fast real transfers move, measured on the side: no byte is sent for it.

    rate = sum of bytes, older ones forgotten / sum of busy seconds, forgotten at the same pace

Only time in which a transfer was under way counts, so pauses between files and whole idle rounds change nothing.
Transfers that overlap share the clock: four downloads at once give the rate of the line, not a quarter of it. It is a
quotient of two sums and not a mean of rates, because a send buffer swallows the first megabytes in no time and pays it
back at the end; both are in the same sums.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType

HALF_LIFE_S = 20.0
"""Busy seconds after which a byte counts half: long against one send buffer, short against an evening."""
TINY_BYTES = 64 * 1024
"""Transfers below this last a round trip, whatever the line can do; they are left out."""
ENOUGH_BYTES, ENOUGH_S = 256 * 1024, 0.1
"""Less than this says nothing."""


class Throughput:
    """Bytes per second in one direction. Thread-safe; it does no input or output of its own."""

    def __init__(self, *, half_life_s: float = HALF_LIFE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._half_life_s = half_life_s
        self._clock = clock
        self._lock = threading.Lock()
        self._active = 0
        self._last = 0.0
        self._bytes = self._seconds = 0.0
        self._total_bytes, self._total_s = 0, 0.0

    @property
    def bytes_per_s(self) -> float | None:
        """The rate; None before enough has moved."""
        with self._lock:
            if self._total_bytes < ENOUGH_BYTES or self._total_s < ENOUGH_S:
                return None
            return self._bytes / self._seconds

    @property
    def observed(self) -> tuple[int, float]:
        """(bytes, busy seconds) that the rate rests on, the forgotten ones included."""
        with self._lock:
            return self._total_bytes, self._total_s

    def transfer(self, size_bytes: int) -> Transfer:
        """A context for one transfer that is about to move ``size_bytes``."""
        return Transfer(self, ignored=size_bytes < TINY_BYTES)

    def begin(self) -> bool:
        """A transfer starts. Returns whether the clock was running already."""
        with self._lock:
            self._active += 1
            if self._active > 1:
                return True
            self._last = self._clock()
            return False

    def moved(self, size_bytes: int) -> None:
        """Bytes have moved since the last event, or only time has passed (0)."""
        with self._lock:
            now = self._clock()
            seconds, self._last = now - self._last, now
            self._total_bytes += size_bytes
            if seconds <= 0:
                self._bytes += size_bytes
                return
            self._total_s += seconds
            kept = 0.5 ** (seconds / self._half_life_s)
            # What these seconds weigh at their end, each forgotten by its own age; the bytes lie evenly over them.
            weight = (1 - kept) * self._half_life_s / math.log(2)
            self._bytes = self._bytes * kept + size_bytes * weight / seconds
            self._seconds = self._seconds * kept + weight

    def end(self) -> None:
        """A transfer is over; time since the last event was not its."""
        with self._lock:
            self._active -= 1


class Transfer:
    """One transfer of a `Throughput`; leave the context in any way.

    Receiving: call `moved` for every chunk. The clock starts with the first, whose bytes came before it and count only
    where another transfer kept the clock running. Sending: call `start` before the first chunk, `moved` after each, and
    `finish` at the answer, since only then all bytes have left. A transfer that breaks ends with its last chunk.
    """

    def __init__(self, throughput: Throughput, *, ignored: bool) -> None:
        self._throughput = throughput
        self._ignored = ignored
        self._running = False

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._running = False
            self._throughput.end()

    def start(self) -> None:
        """Start the clock now."""
        if not self._ignored and not self._running:
            self._throughput.begin()
            self._running = True

    def moved(self, size_bytes: int) -> None:
        """A chunk has moved."""
        if self._ignored:
            return
        if not self._running:
            self._running = True
            if not self._throughput.begin():
                return
        self._throughput.moved(size_bytes)

    def finish(self) -> None:
        """The other side has confirmed everything."""
        if self._running:
            self._throughput.moved(0)
