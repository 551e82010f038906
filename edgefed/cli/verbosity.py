"""How much edgefed says on stderr: --log-level, -v and -q, before or after the verb, and the form of a log line."""

from __future__ import annotations

import logging
from typing import Any

import click

LEVELS = ("debug", "info", "warning", "error")
TIMED_VERBS = ("join", "serve")
"""Verbs that run for hours: each of their lines begins with the time."""
_KEY = "edgefed.log_level"


def verbosity_options() -> list[click.Option]:
    """--log-level, -v and -q, for the group and for every verb; `log_level` has what was given last."""

    def note(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value:
            ctx.meta[_KEY] = {"verbose": "debug", "quiet": "warning"}.get(param.name or "", value)

    common: dict[str, Any] = {"expose_value": False, "callback": note}
    return [
        click.Option(["--log-level"], type=click.Choice(LEVELS), help="Least severe messages to show.", **common),
        click.Option(["-v", "--verbose"], is_flag=True, help="As --log-level debug.", **common),
        click.Option(["-q", "--quiet"], is_flag=True, help="Show no notices and no progress.", **common),
    ]


def log_level(ctx: click.Context) -> str:
    """The level that was asked for, by default info."""
    return str(ctx.meta.get(_KEY, "info"))


class NoticeHandler(logging.Handler):
    """Prints log records as notices, so that they neither look different nor disturb a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        try:
            from edgefed.cli.output import print_note

            mark = {logging.WARNING: "warning: ", logging.ERROR: "error: "}.get(record.levelno, "")
            print_note(mark + self.format(record))
        except Exception:  # as in every handler: a log line must not end the program
            self.handleError(record)


def set_up_logging(level: str, verb: str = "") -> None:
    """Show log lines of edgefed from ``level`` as notices of this verb."""
    logger = logging.getLogger("edgefed")
    logger.handlers[:] = [NoticeHandler()]
    logger.setLevel(level.upper())
    logger.propagate = False
    if verb in TIMED_VERBS:
        from edgefed.cli.output import show_times

        show_times()
