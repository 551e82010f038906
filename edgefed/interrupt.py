"""Stopping: one event, which the command line sets on Ctrl-C, ends every wait and every transfer.

A blocking socket read does not notice an event, so `run_interruptibly` runs the request in a daemon thread and watches
both. An abandoned request ends by itself: its next byte raises `StopRequested`, its socket times out, or the process
exits.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TypeVar

WATCH_S = 0.1
"""How often the stop event is checked during a request: the longest delay of Ctrl-C."""

T = TypeVar("T")


class StopRequested(Exception):
    """The agent was asked to stop. Not an error: the journal stays resumable."""


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
