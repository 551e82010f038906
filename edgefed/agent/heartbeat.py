"""Tells the aggregator every few seconds that this device lives and what it does, also while it trains."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger("edgefed.agent")

MIN_INTERVAL_S = 0.05
MAX_INTERVAL_S = 300.0


class HeartbeatThread:
    """Calls ``send()`` every ``interval_s``. A failure is only logged: the loop's own requests report trouble."""

    def __init__(self, send: Callable[[], None], interval_s: float) -> None:
        self._send = send
        self.interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="edgefed-heartbeat", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Stop; waits at most ``timeout_s`` for a heartbeat on its way."""
        self._ended.set()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while not self._ended.wait(min(max(self.interval_s, MIN_INTERVAL_S), MAX_INTERVAL_S)):
            try:
                self._send()
            except Exception as fault:  # this thread must outlive every failure
                logger.debug("heartbeat failed: %s", fault)
