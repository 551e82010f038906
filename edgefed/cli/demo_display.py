"""What the demo shows while it runs: tables on a terminal, lines elsewhere, and on both how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgefed.progress import Pulse, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from edgefed.protocol.messages import Status

START_SHARE, ROUNDS_SHARE, COMPARE_SHARE = 0.15, 0.45, 0.2
"""Shares of a method's time: its processes start, its rounds, and, of the first method, the clients compare. Estimates;
the rest goes into the evaluation of the global models."""
LEAST_SHARE = 0.05
"""Before this share is done, the time that is left is unknown."""
MUCH_LATER = 1.25
LEAST_LEFT_S = 1.0


class DemoDisplay:
    """Live progress of the demo. ``usual_s``: how long it takes on two cores, said at the start.

    A line is printed once, when something has happened. What goes on since, and how long it may take, is a line below
    the table of a terminal; elsewhere it is printed after seconds of silence.
    """

    def __init__(self, rounds: int, methods: int, usual_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        from edgefed.cli.output import stderr_console

        self._console = stderr_console()
        self._rounds, self._num_methods, self._usual_s, self._clock = rounds, methods, usual_s, clock
        self._seen_rounds = self._methods = 0
        self._share = 0.0
        self._started = clock()
        self._due: float | None = None
        self._doing = ""
        self._table: RenderableType = ""
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
        self.note(f"{name}: starting the aggregator and the agents", "starting")

    def status(self, status: Status) -> None:
        """Show the status of the run, and a line for each round that ended since the last call."""
        from edgefed.cli.status import render_status
        from edgefed.methods.registry import is_personal
        from edgefed.progress import round_line

        for done in status.history[self._seen_rounds :]:
            received = f"{done.updates} of {done.participants} clients"
            line = round_line(done.server_round, self._rounds, done.metrics, done.seconds, received)
            self._reach(START_SHARE + ROUNDS_SHARE * done.server_round / self._rounds)
            self.note(f"{status.run.method}: {line}", f"round {min(done.server_round + 1, self._rounds)}")
        ended = status.state == "finished" and self._seen_rounds < len(status.history)
        if ended and self._methods == 1 and not is_personal(status.run.method):
            text = "comparing: the clients evaluate the final model and train alone, as long as the rounds took"
            self.note(text, "comparing")
        self._seen_rounds = len(status.history)
        height = None if self._console.height is None else self._console.height - 1
        self._table = render_status(status, height, devices=False)  # they are all this one
        self._draw()

    def evaluated(self, models: int, of: int) -> None:
        """Report that ``models`` of the global models are evaluated."""
        before = START_SHARE + ROUNDS_SHARE + (COMPARE_SHARE if self._methods == 1 else 0.0)
        self._reach(before + (1 - before) * models / of)
        self.note(f"evaluated {models} of {of} global models", "evaluating")

    def note(self, text: str, doing: str = "") -> None:
        """Print one line, with the time that is left where it is known. ``doing``: what goes on from now, in a word."""
        self._end_pulse()
        if not doing.startswith(("round", "comparing")):
            self._table = ""  # the run is over: its last state says nothing of what goes on
        self._doing = doing or text
        self._draw()
        left = self._left()
        self._console.print(f"{text} ({left})" if left else text, markup=False)
        self._pulse = Pulse(self._still)
        self._pulse.__enter__()

    def _still(self, seconds: float) -> None:
        if self._live:
            self._draw()
        else:
            self._console.print(f"{self._doing}: {self._so_far(seconds)}", markup=False)

    def _so_far(self, seconds: float) -> str:
        return ", ".join(filter(None, [f"{format_seconds(seconds)} so far", self._left()]))

    def _draw(self) -> None:
        from rich.console import Group
        from rich.text import Text

        if self._live:
            footer = ", ".join(filter(None, [self._doing, self._left()]))
            self._live.update(Group(self._table, Text(footer, style="dim", no_wrap=True)), refresh=True)

    def _reach(self, share: float) -> None:
        """Note that this share of the method is done, and estimate when all is done.

        A later estimate replaces an earlier one only if it is much later: what is left counts down.
        """
        self._share = share
        done = (max(0, self._methods - 1) + share) / self._num_methods
        if done < LEAST_SHARE:
            return
        now = self._clock()
        due = now + (now - self._started) * (1 - done) / done
        if self._due is None or due < self._due or due - now > MUCH_LATER * (self._due - now):
            self._due = due

    def _left(self) -> str:
        """``about 40 s left``; nothing where that is unknown, or past."""
        left = 0.0 if self._due is None else self._due - self._clock()
        return f"about {format_seconds(left)} left" if left >= LEAST_LEFT_S else ""

    def _end_pulse(self) -> None:
        if self._pulse is not None:
            self._pulse.__exit__()
            self._pulse = None
