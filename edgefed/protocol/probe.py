"""What both sides of `routes.PROBE` must agree on: limits, and the marks by which a receiver tells a transfer's pace.

Only the receiver's clock is used: a sender hands its bytes to a buffer and does not know when they arrive.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_PROBE_BYTES = 8 * 1024 * 1024
"""Largest body of one request, either way."""
PROBE_BLOCK_BYTES = 64 * 1024
"""Written at once, and the size that a measurement starts with."""
MAX_PROBE_S = 30.0
"""A transfer is ended after this long; what moved until then is the answer."""
MAX_MARKS = 64

Mark = tuple[float, int]
"""(seconds since the first bytes came, bytes that have come)."""


class MarkRecorder:
    """Notes the pace of one arriving transfer, with at most about `MAX_MARKS` marks whatever the size."""

    def __init__(self, size_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._every = -(-size_bytes // MAX_MARKS)
        self._marks: list[Mark] = []
        self._started = 0.0
        self._newest: Mark = (0.0, 0)

    @property
    def size_bytes(self) -> int:
        """Bytes so far."""
        return self._newest[1]

    def arrived(self, size_bytes: int) -> None:
        """Some bytes came."""
        now = self._clock()
        if not self._newest[1]:
            self._started = now
        self._newest = (now - self._started, self._newest[1] + size_bytes)
        if not self._marks or self._newest[1] - self._marks[-1][1] >= self._every:
            self._marks.append(self._newest)

    def marks(self) -> tuple[Mark, ...]:
        """All marks, the first at second 0 and the last at the newest bytes; empty when nothing came."""
        closing = (self._newest,) if self._marks and self._newest != self._marks[-1] else ()
        return (*self._marks, *closing)
