"""What edgefed says on stderr: --log-level, -v and -q, before or after the verb, and the form of a log line."""

from __future__ import annotations

import logging
from typing import Any

import click

LEVELS = ("debug", "info", "warning", "error")
TIMED_VERBS = ("join", "serve")
"""Verbs that run for hours: each of their lines begins with the time."""
FORMATS = ("text", "json")
_KEY, _FORMAT_KEY = "edgefed.log_level", "edgefed.log_format"


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


def format_options(verb: str) -> list[click.Option]:
    """--log-format, for verbs whose lines go to a log."""
    if verb not in TIMED_VERBS:
        return []

    def note(ctx: click.Context, _: click.Parameter, value: str) -> None:
        ctx.meta[_FORMAT_KEY] = value

    text = "Form of log lines: for people, or one JSON object a line."
    chosen = click.Choice(FORMATS)
    return [click.Option(["--log-format"], type=chosen, default="text", help=text, expose_value=False, callback=note)]


def log_format(ctx: click.Context) -> str:
    """The form of log lines that was asked for."""
    return str(ctx.meta.get(_FORMAT_KEY, FORMATS[0]))


def log_level(ctx: click.Context) -> str:
    """The level that was asked for, by default info."""
    return str(ctx.meta.get(_KEY, "info"))


class NoticeHandler(logging.Handler):
    """Prints log records as notices, so that they neither look different nor disturb a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        try:
            from edgefed.cli.output import print_note

            print_note(self.format(record), level=record.levelname.lower(), source=record.name)
        except Exception:  # as in every handler: a log line must not end the program
            self.handleError(record)


def set_up_logging(level: str, verb: str = "", line_format: str = FORMATS[0]) -> None:
    """Show log lines of edgefed from ``level`` as notices of this verb, in one of `FORMATS`."""
    logger = logging.getLogger("edgefed")
    logger.handlers[:] = [NoticeHandler()]
    logger.setLevel(level.upper())
    logger.propagate = False
    if verb in TIMED_VERBS:
        from edgefed.cli.output import show_json_lines, show_times

        show_times()
        show_json_lines(line_format == "json")
