"""What the demo shows while it runs: tables on a terminal, lines elsewhere, and on both how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgefed.progress import Pulse, format_seconds

if TYPE_CHECKING:
    from edgefed.protocol.messages import Status

START_SHARE, ROUNDS_SHARE, COMPARE_SHARE = 0.15, 0.45, 0.2
"""Shares of a method's time: its processes start, its rounds, and, of the first method, the clients compare. Estimates;
the rest goes into the evaluation of the global models."""
LEAST_SHARE = 0.05
"""Before this share is done, the time that is left is unknown."""


class DemoDisplay:
    """Live progress of the demo. ``usual_s``: how long it takes on two cores, said at the start."""

    def __init__(self, rounds: int, methods: int, usual_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        from edgefed.cli.output import stderr_console

        self._console = stderr_console()
        self._rounds, self._num_methods, self._usual_s, self._clock = rounds, methods, usual_s, clock
        self._seen_rounds = self._methods = 0
        self._share = 0.0
        self._started = clock()
        self._pulse: Pulse | None = None
        live = self._console.is_terminal
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if live else None

    def __enter__(self) -> DemoDisplay:
        if self._live:
            self._live.start()
        self.note(f"with its usual settings, this takes about {format_seconds(self._usual_s)} on two idle cores")
        return self

    def __exit__(self, *_: object) -> None:
        self._end_pulse()
        if self._live:
            self._live.stop()

    def method(self, name: str) -> None:
        """Report the start of a method's run."""
        self._methods += 1
        self._seen_rounds = 0
        self._share = 0.0
        self.note(f"{name}: starting the aggregator and the agents")

    def status(self, status: Status) -> None:
        """Show the status of the run, and a line for each round that ended since the last call."""
        from edgefed.cli.status import render_status
        from edgefed.methods.registry import is_personal
        from edgefed.progress import round_line

        for done in status.history[self._seen_rounds :]:
            received = f"{done.updates} of {done.participants} clients"
            line = round_line(done.server_round, self._rounds, done.metrics, done.seconds, received)
            self._share = START_SHARE + ROUNDS_SHARE * done.server_round / self._rounds
            self.note(f"{status.run.method}: {line}")
        ended = status.state == "finished" and self._seen_rounds < len(status.history)
        if ended and self._methods == 1 and not is_personal(status.run.method):
            self.note("comparing: the clients evaluate the final model and train alone, as long as the rounds took")
        self._seen_rounds = len(status.history)
        if self._live:
            self._live.update(render_status(status, self._console.height), refresh=True)

    def evaluated(self, models: int, of: int) -> None:
        """Report that ``models`` of the global models are evaluated."""
        before = START_SHARE + ROUNDS_SHARE + (COMPARE_SHARE if self._methods == 1 else 0.0)
        self._share = before + (1 - before) * models / of
        self.note(f"evaluated {models} of {of} global models")

    def note(self, text: str) -> None:
        """Print one line, with the time that is left where it is known, and repeat it while nothing else happens."""
        self._end_pulse()
        self._print(text, self._left())

        def still(seconds: float) -> None:
            self._print(text, f"{format_seconds(seconds)} so far{', ' + left if (left := self._left()) else ''}")

        self._pulse = Pulse(still)
        self._pulse.__enter__()

    def _print(self, text: str, addition: str) -> None:
        self._console.print(f"{text} ({addition})" if addition else text, markup=False)

    def _left(self) -> str:
        """``about 40 s left``, from the time so far and the share of the work that is done."""
        share = (max(0, self._methods - 1) + self._share) / self._num_methods
        if share < LEAST_SHARE or share >= 1:
            return ""
        return f"about {format_seconds((self._clock() - self._started) * (1 - share) / share)} left"

    def _end_pulse(self) -> None:
        if self._pulse is not None:
            self._pulse.__exit__()
            self._pulse = None
