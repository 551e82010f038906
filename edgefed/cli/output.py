"""What the command line prints: results on stdout, progress and errors on stderr, JSON where it was asked for."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edgefed.cli.phrasing import to_flags
from edgefed.disk import without_nan
from edgefed.errors import EdgefedError
from edgefed.hardware.memory import format_bytes
from edgefed.progress import Pulse, remaining

CLI_LOGGER = "edgefed.cli"
"""The logger that lines of the command line itself name."""
PLAIN_WIDTH = 140
"""Width of tables that are written to a file or a pipe."""


def stdout_console() -> Console:
    """For results. Colour only on a terminal and without NO_COLOR, which Rich looks after."""
    return Console(highlight=False, emoji=False, soft_wrap=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def stderr_console(*, quiet: bool | None = None) -> Console:
    """For notices, progress and errors. ``quiet``: print nothing; by default with -q, or a log level above info."""
    if quiet is None:
        quiet = logging.getLogger("edgefed").level > logging.INFO
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=not sys.stderr.isatty(), quiet=quiet)


_times = threading.Event()
_json_lines = threading.Event()


def show_times() -> None:
    """Begin each notice with the time: in UTC with the date in a log, the local time of day on a terminal."""
    _times.set()


def show_json_lines(wanted: bool) -> None:
    """Write notices and errors as JSON, one object a line, instead of text."""
    if wanted:
        _json_lines.set()
    else:
        _json_lines.clear()


def _print_json_line(level: str, source: str, message: str, **more: object) -> None:
    now = time.time()
    when = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"
    line = {"time": when, "level": level, "logger": source, "message": message, **more}
    print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)


def stamp() -> str:
    """The time as notices begin with it, or nothing."""
    if not _times.is_set():
        return ""
    return time.strftime("%H:%M:%S ") if sys.stderr.isatty() else time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime())


def print_json(data: object) -> None:
    """One JSON document on stdout; floats that JSON cannot write (NaN) become null."""
    print(json.dumps(without_nan(data), indent=2))


def print_error(error: EdgefedError, *, as_json: bool) -> None:
    """An error for people (what, then what to do) or, with --json, for programs. Always on stderr."""
    if _json_lines.is_set():
        _print_json_line("error", CLI_LOGGER, to_flags(str(error)), code=error.code, remedy=to_flags(error.remedy))
        return
    if as_json:
        reply = {"error": {"code": error.code, "message": to_flags(str(error)), "remedy": to_flags(error.remedy)}}
        print(json.dumps(reply), file=sys.stderr)
        return
    console = stderr_console(quiet=False)
    console.print(f"[bold red]error\\[{error.code}][/]: ", end="")
    console.print(to_flags(str(error)), markup=False)
    console.print(f"  {to_flags(error.remedy)}", markup=False)


def print_note(text: str, *, to_copy: bool = False, level: str = "info", source: str = CLI_LOGGER) -> None:
    """Print one line on stderr that is not an error of the command. ``to_copy``: a command in it is not broken up.

    ``level`` and ``source`` are those of a log record.
    """
    console, text = stderr_console(), to_flags(text)
    if _json_lines.is_set():
        if not console.quiet:
            _print_json_line(level, source, text)
        return
    mark = f"{level}: " if level in ("warning", "error") else ""
    console.print(stamp() + mark + text, markup=False, soft_wrap=to_copy or None)


HINTS = {
    "load": "; torch and the data are read, on a slow disk for a minute",
    "prepare": "; the tokenizer and the frozen part of the model are read",
    "evaluate": "; the held-out text is read",
}
"""What phases do whose end cannot be computed."""


class TerminalProgress:
    """Progress of an agent or a tool: a bar per phase on a terminal, a line per finished phase elsewhere.

    Implements `edgefed.progress.ProgressSink`. Phases of less than ``quiet_s`` seconds leave no line in a log.
    """

    def __init__(self, quiet_s: float = 0.5) -> None:
        self._console = stderr_console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._quiet_s = quiet_s
        self._name, self._unit, self._count, self._started = "", "B", 0, 0.0
        self._total: int | None = None
        self._pulse: Pulse | None = None

    def phase(self, name: str, total: int | None = None, unit: str = "B") -> None:
        """Start a bar for a phase, and end the phase before it."""
        self.done()
        self._name, self._unit, self._count, self._started = name, unit, 0, time.monotonic()
        self._total = total
        if self._console.is_terminal and not _json_lines.is_set():
            self._bar = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[amount]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(name, total=total or None, amount="")
        else:
            self._pulse = Pulse(self._say)
            self._pulse.__enter__()

    def advance(self, n: int) -> None:
        """Move the bar by ``n`` units."""
        self._count += n
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=n, amount=self._amount())

    def message(self, text: str) -> None:
        """Print one line above the bar."""
        if self._bar is None:
            print_note(text)
        else:
            self._bar.console.print(stamp() + to_flags(text), markup=False)

    def done(self) -> None:
        """End the phase; a line with its amount and duration remains in a log."""
        if not self._name:
            return
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._pulse is not None:
            self._pulse.__exit__()
            self._pulse = None
        seconds = time.monotonic() - self._started
        if seconds >= self._quiet_s:
            print_note(f"{self._name:<10} {self._amount():>12}  {seconds:.1f} s")
        self._name = ""

    def _say(self, seconds: float) -> None:
        """In a log: what goes on, and how long it may take."""
        left = remaining(self._count, self._total, seconds)
        amount = f" {done}," if (done := self._amount()) else ""
        hint = HINTS.get(self._name, "") if not self._count else ""
        print_note(f"{self._name}:{amount} {left}{hint}")

    def _amount(self) -> str:
        if not self._count:
            return ""
        if self._unit == "B":
            whole = f" of {format_bytes(self._total)}" if self._total and self._count < self._total else ""
            return format_bytes(self._count) + whole
        done = f"{self._count}/{self._total}" if self._total and self._count < self._total else str(self._count)
        return f"{done} {self._unit}s"
