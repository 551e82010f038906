"""The ``edgefed`` command: finds the verb, reads settings, and turns every error into a message and an exit status."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgefed import __version__
from edgefed.cli.verbosity import log_level, set_up_logging, verbosity_options
from edgefed.errors import DiskFull, EdgefedError, StorageError, did_you_mean

if TYPE_CHECKING:
    from edgefed.cli.options import SettingsCommand

VERBS = {
    "backup": "Copy a run, also while it is served.",
    "bench": "Measure this device and show which models fit.",
    "chat": "Talk to the model of a run.",
    "clients": "List, remove or ban the clients of a run.",
    "demo": "Run a whole federation on this machine.",
    "doctor": "Check this device and name what to fix.",
    "export": "Write the model of a run in a format that other tools load.",
    "invite": "Make a join link for a device.",
    "join": "Take part in a run with this device's data.",
    "partition": "Split a labelled data set among clients.",
    "predict": "Predict with a client's own model.",
    "profile": "Show which experts a text uses.",
    "serve": "Coordinate a run.",
    "simulate": "Simulate a fleet of devices on this machine.",
    "status": "Show the progress of a run.",
}
"""Verb -> summary; each verb is ``NAME_command`` in ``edgefed/cli/NAME.py``, imported when it is used."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""


class LazyGroup(click.Group):
    """Imports a verb only when it is used: `edgefed --help` imports none, `edgefed status` does not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb, imported now; None for an unknown one."""
        return verb_command(cmd_name) if cmd_name in VERBS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the first word. An unknown one is refused with the most similar verb."""
        if args[0] not in VERBS and not ctx.resilient_parsing:
            ctx.fail(f"unknown command {args[0]!r}.{did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


def verb_command(verb: str) -> SettingsCommand:
    """The command of a verb."""
    command: SettingsCommand = getattr(importlib.import_module(f"edgefed.cli.{verb}"), f"{verb}_command")
    return command


@click.group(cls=LazyGroup, context_settings={"auto_envvar_prefix": "EDGEFED", "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="edgefed")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="Settings file; default: edgefed.toml in this folder, if there is one.",
)
@click.pass_context
def cli(ctx: click.Context, config_path: Path | None) -> None:
    """Fine-tune Mixture-of-Experts language models across the devices that people already own.

    Settings come from flags, then EDGEFED_VERB_OPTION variables, then edgefed.toml, then defaults. `edgefed COMMAND
    --help` shows the flags of a command, with examples.
    """
    set_up_logging(log_level(ctx))
    path = config_path or Path("edgefed.toml")
    if config_path or path.exists():
        from edgefed.config import load_settings

        fields = {verb: {field.flag: field for field in verb_command(verb).fields} for verb in VERBS}
        ctx.default_map = load_settings(path, fields)


cli.params += verbosity_options()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit. No user mistake ends in a traceback."""
    # libgomp reads this when torch is loaded. By default a thread that waits for the others spins for milliseconds;
    # with as many threads as cores and other work on the machine, that took most of a round.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of clients need not be in the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments is None and os.name == "posix":
        from edgefed.cli.hidden_token import hide_secrets

        hide_secrets()
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    status: Any
    try:
        status = cli.main(args=words, prog_name="edgefed", standalone_mode=False) or 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end the exit with a traceback
        from edgefed.cli.output import print_note

        print_note("stopped")
        status = INTERRUPTED
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except EdgefedError as error:
        logging.getLogger("edgefed").debug("traceback", exc_info=True)
        status = _report(error, as_json)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        status = 1
    except OSError as error:
        from edgefed.disk import FULL  # EDQUOT does not exist on Windows

        disk_full = error.errno in FULL
        if error.filename is None and not disk_full:
            raise
        kind = DiskFull if disk_full else StorageError
        status = _report(kind(f"{error.filename or 'writing'}: {error.strerror}"), as_json)
    sys.exit(status if isinstance(status, int) else 0)


def _report(error: EdgefedError, as_json: bool) -> int:
    from edgefed.cli.output import print_error

    print_error(error, as_json=as_json)
    return error.exit_status
