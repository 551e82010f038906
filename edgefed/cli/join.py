"""``edgefed join``: take part in a run with this device and its own data."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from typing import Annotated

from edgefed.api.client import Client
from edgefed.cli.options import command
from edgefed.config import Setting


@dataclasses.dataclass
class JoinSettings(Client):
    """What `edgefed join` takes: the settings of `edgefed.Client`, and how to print."""

    dry_run: Annotated[
        bool, Setting("Only say what this device would do in the run; it does not register and trains nothing.")
    ] = False
    json: Annotated[bool, Setting("Print a summary as JSON at the end.")] = False


@command("join", JoinSettings)
def join_command(settings: JoinSettings) -> None:
    """Take part in a run with this device's data.

    Joins the run at SERVER (http://host:port) and trains on DATA until it ends or Ctrl-C.
    """
    if settings.dry_run:
        _dry_run(settings)
        return
    from edgefed.cli.output import TerminalProgress, print_json, print_note, stdout_console
    from edgefed.hardware.memory import format_bytes
    from edgefed.progress import stop_signals

    stop = threading.Event()

    def ask_to_stop(signum: int, frame: object) -> None:
        if stop.is_set():  # the second Ctrl-C ends the process at once
            sys.exit(130)
        stop.set()
        with contextlib.suppress(OSError):  # a signal may have interrupted a buffered write: write past the buffer
            os.write(sys.stderr.fileno(), b"stopping; Ctrl-C again ends at once\n")

    for signum in stop_signals():
        signal.signal(signum, ask_to_stop)
    summary = settings.run(progress=TerminalProgress(), stop=stop)
    if settings.json:
        import msgspec

        print_json(msgspec.to_builtins(summary))
    elif summary.comparison is not None:
        from edgefed.cli.tables import print_comparisons

        print_comparisons(stdout_console(), {settings.name or "this device": summary.comparison}, own=True)
    sentence = str(summary) if summary.run_rounds else "Stopped before this device joined."
    print_note(f"{sentence} {format_bytes(summary.bytes_down)} down, {format_bytes(summary.bytes_up)} up.")
    if stop.is_set():
        sys.exit(130)


def _dry_run(settings: JoinSettings) -> None:
    """Print what this device would do in the run."""
    from edgefed.cli.output import TerminalProgress, print_json, stdout_console

    found = settings.preview(progress=TerminalProgress())
    if settings.json:
        print_json({**dataclasses.asdict(found), "verdict": str(found)})
    else:
        stdout_console().print(str(found), style="bold", markup=False)
