"""Limits of `routes.PROBE`, and the marks with which a receiver reports the pace of a transfer.

Only the receiver's clock is used, because a sender does not know when its bytes arrive.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

MAX_PROBE_BYTES = 8 * 1024 * 1024
"""Largest body of one request, in either direction."""
PROBE_BLOCK_BYTES = 64 * 1024
"""Size of one write, and of the first probe of a measurement."""
MAX_PROBE_S = 30.0
"""Time limit of a transfer; the answer is what has moved until then."""
MAX_MARKS = 64

Mark = tuple[float, int]
"""(seconds since the first bytes, bytes so far)."""


def random_blocks(size_bytes: int, sent: Callable[[int], None]) -> Iterator[bytes]:
    """``size_bytes`` random bytes in blocks, all the same; ``sent`` gets the size of each when it is taken."""
    block = os.urandom(min(size_bytes, PROBE_BLOCK_BYTES))
    for begin in range(0, size_bytes, PROBE_BLOCK_BYTES):
        chunk = block[: size_bytes - begin]
        yield chunk
        sent(len(chunk))


class MarkRecorder:
    """Records the pace of one incoming transfer in about `MAX_MARKS` marks at most."""

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
        """Count bytes that have arrived."""
        now = self._clock()
        if not self._newest[1]:
            self._started = now
        self._newest = (now - self._started, self._newest[1] + size_bytes)
        if not self._marks or self._newest[1] - self._marks[-1][1] >= self._every:
            self._marks.append(self._newest)

    def marks(self) -> tuple[Mark, ...]:
        """All marks, from second 0 to the newest bytes; empty if nothing arrived."""
        closing = (self._newest,) if self._marks and self._newest != self._marks[-1] else ()
        return (*self._marks, *closing)
