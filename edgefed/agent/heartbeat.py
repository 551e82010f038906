"""The thread that sends a device's heartbeats."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

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
