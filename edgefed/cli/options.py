"""Makes click commands from settings classes (`edgefed.config`): one definition for flags, variables, file and help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from edgefed.cli.examples import EXAMPLES
from edgefed.cli.phrasing import to_flags
from edgefed.cli.verbosity import format_options, log_format, log_level, set_up_logging, verbosity_options
from edgefed.config import SettingField, fields_of, parse_assignments

S = TypeVar("S")


class SettingsCommand(click.Command):
    """A command that calls ``run`` with an instance of ``settings``; ``fields`` are what the user can set."""

    def __init__(self, name: str, settings: type[S], run: Callable[[S], None]) -> None:
        self.fields = fields_of(settings)
        self._settings, self._run = settings, run
        flags = {field.name: f"--{field.flag}" for field in self.fields}
        params = [_parameter(name, field, flags) for field in self.fields]
        params += [_renamed(field) for field in self.fields if field.setting.formerly]
        params += [*verbosity_options(), *format_options(name)]
        super().__init__(name, params=params, callback=self._call, help=run.__doc__)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, after the options."""
        if examples := EXAMPLES.get(self.name or ""):
            with formatter.section("Examples"):
                for comment, line in examples:
                    formatter.write_text(f"# {comment}")
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")  # never wrapped: to be copied

    def _call(self, **values: Any) -> None:
        ctx = click.get_current_context()
        set_up_logging(log_level(ctx), self.name or "", log_format(ctx))
        given = {field.name: _converted(field, values[field.name]) for field in self.fields}
        self._run(self._settings(**{name: value for name, value in given.items() if value is not dataclasses.MISSING}))


def command(name: str, settings: type[S]) -> Callable[[Callable[[S], None]], SettingsCommand]:
    """Turn a function of settings into the command ``name``; its docstring is the help text."""
    return lambda run: SettingsCommand(name, settings, run)


def given_as_flag(name: str) -> bool:
    """Whether the running command got this setting on the command line, rather than from variables or a file."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def variable_of(verb: str, field: SettingField) -> str:
    """The environment variable of a setting."""
    return field.setting.variable or f"EDGEFED_{verb}_{field.flag}".upper().replace("-", "_")


def default_text(field: SettingField) -> str | None:
    """The default as help and reference show it; None where there is nothing to show."""
    if field.setting.default is not None:
        return field.setting.default
    if field.required or field.default is None or field.default in (False, ()):
        return None
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def _parameter(verb: str, field: SettingField, flags: Mapping[str, str]) -> click.Parameter:
    setting, kind = field.setting, _click_type(field)
    if setting.positional:
        default = {} if field.required else {"default": field.default}
        many = -1 if field.many == "any" else 1
        return click.Argument(
            [field.name], type=kind, required=field.required, nargs=many, metavar=setting.metavar, **default
        )
    # To click, None is a value: a required option has no default, and an optional switch that is not given is None.
    default = {} if field.required else {"default": None if field.default == () else field.default}
    shown = default_text(field)
    text = to_flags(setting.help, flags)
    if setting.default is not None:
        text = f"{text}  [default: {to_flags(shown or '', flags)}]".strip()
    return click.Option(
        [f"--{field.flag}", field.name],
        type=None if field.kind is bool else kind,
        help=text or None,
        show_default=shown is not None and setting.default is None,
        required=field.required,
        envvar=variable_of(verb, field),
        metavar="@FILE" if setting.secret else setting.metavar,
        callback=_read_secret if setting.secret else None,
        is_flag=True if field.kind is bool else None,
        multiple=field.many in ("any", "pairs"),
        nargs=2 if field.many == "two" else None,
        **default,
    )


def _read_secret(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The secret in @FILE; one from a variable or the settings file as it is. Other users can read command lines.

    On POSIX systems `hide_secrets` has already moved a token that was given as text.
    """
    if value is None or not value.startswith("@"):
        on_command_line = ctx.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE
        if value and on_command_line:
            raise click.UsageError(
                f"{param.opts[0]} takes @FILE: every user of this machine can read a secret on a command line. "
                f"Write it to a file of your own, or set {param.envvar}."
            )
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"cannot read the file of {param.opts[0]}: {error}") from error


def _click_type(field: SettingField) -> click.ParamType[Any]:
    setting = field.setting
    if field.choices:
        return click.Choice(field.choices)
    if field.kind is Path:
        return click.Path(path_type=Path)
    if field.kind in (int, float):
        low, high = setting.minimum if setting.above is None else setting.above, setting.maximum
        if field.kind is int:
            return click.IntRange(None if low is None else int(low), None if high is None else int(high))
        return click.FloatRange(low, high, min_open=setting.above is not None)
    return click.STRING


def _converted(field: SettingField, value: Any) -> Any:
    if field.many == "pairs":
        return parse_assignments(value, field.name)
    return value


def _renamed(field: SettingField) -> click.Option:
    old = field.setting.formerly

    def refuse(ctx: click.Context, param: click.Parameter, value: object) -> None:
        if value is not None:
            raise click.UsageError(f"--{old} was renamed: use --{field.flag} {value}")

    return click.Option([f"--{old}", f"formerly_{field.name}"], hidden=True, expose_value=False, callback=refuse)
