"""The thread that sends a device's heartbeats, and copies of what the server has lost and asks for in its answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from edgefed.disk import hash_file
from edgefed.errors import EdgefedError

logger = logging.getLogger("edgefed.agent")

MIN_INTERVAL_S, MAX_INTERVAL_S = 0.05, 300.0
"""Limits on the interval between two heartbeats."""


class HeartbeatThread:
    """Calls ``send()`` every ``interval_s``, also while the device trains.

    A failure is only logged, because the agent's own requests report problems of the network.
    """

    def __init__(self, send: Callable[[], None], interval_s: float) -> None:
        self._send = send
        self.interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="edgefed-heartbeat", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Stop. Waits at most ``timeout_s`` for a heartbeat in progress."""
        self._ended.set()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while not self._ended.wait(min(max(self.interval_s, MIN_INTERVAL_S), MAX_INTERVAL_S)):
            try:
                self._send()
            except Exception as error:  # this thread must survive every failure
                logger.debug("heartbeat failed: %s", error)


class Copies:
    """Sends the server copies of blobs, one at a time, in a thread of its own: heartbeats go on meanwhile.

    ``find`` returns the file of a blob, whether or not it exists; ``send`` sends it.
    """

    def __init__(self, find: Callable[[str], Path], send: Callable[[str, Path], None]) -> None:
        self._find, self._send = find, send
        self._busy = threading.Lock()

    def offer(self, wanted: Iterable[str]) -> None:
        """Send those of ``wanted`` that are here and whole, unless earlier ones are still being sent."""
        here = [sha256 for sha256 in wanted if sha256.isalnum() and self._find(sha256).is_file()]
        if here and self._busy.acquire(blocking=False):
            threading.Thread(target=self._work, args=(here,), name="edgefed-copies", daemon=True).start()

    def _work(self, here: Iterable[str]) -> None:
        try:
            for sha256 in here:
                path = self._find(sha256)
                if hash_file(path)[0] == sha256:
                    logger.info("the server has lost blob %s: sending it a copy", sha256[:12])
                    self._send(sha256, path)
        except (EdgefedError, OSError) as error:  # the next heartbeat is answered again
            logger.debug("could not send a copy: %s", error)
        finally:
            self._busy.release()
