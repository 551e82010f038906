"""Retries: exponential back-off with full jitter, and which errors are retried.

A device that has joined never gives up on its server. Before that, a wrong address must end in an error, so the first
registration has a time limit. This module does not know HTTP: it repeats a request that knows how to continue by
itself, such as a resumable upload. A library would replace only the loop in `Retry.run`, not the rules beside it:
progress that resets the waits, a stop event, and a limit that depends on whether the device has joined.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from edgefed.agent.channel import BUSY_STATUSES
from edgefed.errors import EdgefedError, ObjectStorageError, ServerUnreachable
from edgefed.progress import pause

logger = logging.getLogger("edgefed.agent")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class BackoffSchedule:
    """Upper limits of the waits in seconds: first_s, first_s * factor, ... up to cap_s.

    A wait is drawn uniformly between 0 and its limit ("full jitter"), so that a hundred devices that lost the same
    server do not return at the same time.
    """

    first_s: float = 0.5
    factor: float = 2.0
    cap_s: float = 30.0

    def limit_s(self, failures: int) -> float:
        """Longest wait after ``failures`` (>= 1) failures in a row."""
        limit = self.first_s
        for _ in range(failures - 1):
            limit *= self.factor
            if limit >= self.cap_s:
                break
        return min(limit, self.cap_s)


def is_transient(error: EdgefedError, *, joined: bool) -> bool:
    """Whether the same request may succeed later.

    True for ServerUnreachable, which includes timeouts and cut connections, for errors of object storage, and for
    errors that arrived with a 5xx status, such as the server's full disk. An answer that no edgefed server gives
    (``error.foreign``: a web page, an untrusted certificate) means a wrong address before the device has joined.
    Afterwards it is a proxy or a login page, which goes away.
    """
    if isinstance(error, (ServerUnreachable, ObjectStorageError)):
        return True
    if error.received_status >= 500 or error.received_status in BUSY_STATUSES:
        return True
    return joined and error.foreign


def is_answer(error: EdgefedError) -> bool:
    """Whether an edgefed server has answered, so its address is right whatever it answered."""
    return error.received_status > 0 and not error.foreign


def never_reached(error: ServerUnreachable, url: str, after_s: float | None) -> ServerUnreachable:
    """The error of a device that has never reached its server, for the user: the address may be wrong."""
    return ServerUnreachable(
        f"no server was ever reached at {url}: gave up after {after_s or 0:.0f} s ({error})",
        remedy="Check host and port, that `edgefed serve` runs there, and that its machine accepts connections from "
        "others (`edgefed serve --host 0.0.0.0` with a token).",
    )


class Retry:
    """Repeats requests until they succeed. One per agent; not thread-safe except for `note_progress`."""

    def __init__(
        self,
        stop: threading.Event,
        *,
        schedule: BackoffSchedule | None = None,
        rng: random.Random | None = None,
        sleep: Callable[[float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``sleep(seconds)`` may raise StopRequested; the default raises it when ``stop`` is set."""
        self.schedule = schedule or BackoffSchedule()
        self.sleep = sleep or (lambda seconds: pause(seconds, stop))
        self._rng = rng or random.Random()
        self._clock = clock
        self._failures = 0

    def note_progress(self) -> None:
        """Reset the waits to the shortest one. Call it for bytes that have reached the other side."""
        self._failures = 0

    def wait(self, failures: int, longest_s: float | None = None) -> None:
        """Wait as after ``failures`` (>= 1) failures in a row, but at most ``longest_s``."""
        seconds = self._rng.uniform(0.0, self.schedule.limit_s(failures))
        self.sleep(seconds if longest_s is None else min(seconds, longest_s))

    def run(
        self,
        request: Callable[[], T],
        *,
        joined: bool = True,
        give_up_after_s: float | None = None,
        until_answered: bool = False,
        on_wait: Callable[[EdgefedError, float | None], None] | None = None,
    ) -> T:
        """Return ``request()``; repeat it while it fails with a transient error (`is_transient`).

        ``on_wait(error, left_s)`` is called before each wait; ``left_s`` is None without a limit. Raises the error if
        it is not transient, or after ``give_up_after_s`` seconds since the first try; None never gives up. With
        ``until_answered`` that limit ends once an edgefed server has answered: then the address is right, and the
        server's trouble passes.
        """
        started = self._clock()
        self._failures = 0
        while True:
            try:
                return request()
            except EdgefedError as error:
                if not is_transient(error, joined=joined):
                    raise
                if until_answered and is_answer(error):
                    give_up_after_s = None
                left = None if give_up_after_s is None else started + give_up_after_s - self._clock()
                if left is not None and left <= 0:
                    raise
                logger.debug("%s; trying again", error)
                if on_wait:
                    on_wait(error, left)
            self._failures += 1
            self.wait(self._failures, left)
