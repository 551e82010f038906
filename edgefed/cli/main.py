"""The ``edgefed`` command: finds the verb, reads settings, and turns every error into a message and an exit status."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from pathlib import Path

import click

from edgefed import __version__
from edgefed.config import load_settings
from edgefed.errors import DiskFull, EdgefedError, StorageError

VERBS = ("bench", "demo", "doctor", "export", "join", "partition", "profile", "serve", "simulate", "status")
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class LazyGroup(click.Group):
    """Imports a verb only when it is used: `edgefed status` does not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command = getattr(importlib.import_module(f"edgefed.cli.{name}"), f"{name}_command")
        for param in command.params:
            # Variables are named after the flags, whatever the parameters are called.
            if isinstance(param, click.Option) and param.envvar is None:
                param.envvar = f"EDGEFED_{name}_{_flag(param)}".upper().replace("-", "_")
        return command


@click.group(cls=LazyGroup, context_settings={"auto_envvar_prefix": "EDGEFED", "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="edgefed")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="Settings file; edgefed.toml in this folder is read without being asked.",
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
@click.pass_context
def cli(ctx: click.Context, config_path: Path | None, log_level: str) -> None:
    """Fine-tune Mixture-of-Experts language models across the devices that people already own.

    Settings come from flags, then EDGEFED_VERB_OPTION variables, then edgefed.toml, then defaults.
    """
    from edgefed.cli.output import set_up_logging

    set_up_logging(log_level)
    path = config_path or Path("edgefed.toml")
    if config_path or path.exists():
        ctx.default_map = load_settings(path, {verb: _setting_names(cli.get_command(ctx, verb)) for verb in VERBS})


def _flag(option: click.Option) -> str:
    return option.opts[0].lstrip("-")


def _setting_names(command: click.Command) -> dict[str, str]:
    """Key of a settings file -> parameter: the long flag without its dashes, or an argument's own name."""
    return {(_flag(param) if isinstance(param, click.Option) else param.name): param.name for param in command.params}


def setting_names() -> frozenset[str]:
    """Every setting of every verb, in snake case."""
    context = click.Context(cli)
    commands = [cli, *(cli.get_command(context, verb) for verb in VERBS)]
    options = [param for command in commands for param in command.params if isinstance(param, click.Option)]
    return frozenset(_flag(option).replace("-", "_") for option in options)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit. No user mistake ends in a traceback."""
    from edgefed.cli.output import print_error, print_note

    # libgomp reads it when torch is loaded. By default a thread that waits for the others spins for milliseconds; with
    # as many threads as cores and anything else at work on the machine, that was most of a round.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    try:
        status = cli.main(args=words, prog_name="edgefed", standalone_mode=False) or 0
    except click.exceptions.Abort:
        status = INTERRUPTED
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except EdgefedError as error:
        logging.getLogger("edgefed").debug("traceback", exc_info=True)
        print_error(error, as_json=as_json)
        status = error.exit_status
    except KeyboardInterrupt:
        print_note("stopped")
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        status = 1
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        print_error(kind(f"{error.filename or 'writing'}: {error.strerror}"), as_json=as_json)
        status = kind.exit_status
    sys.exit(status if isinstance(status, int) else 0)
