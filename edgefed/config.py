"""Settings of a command or an object of the Python API, and the sources of their values.

A settings class is a dataclass whose fields carry a `Setting`:

    @dataclasses.dataclass
    class Bake:
        recipe: Annotated[Path, Setting("What to bake.", positional=True)]
        heat: Annotated[int, Setting("Degrees Celsius.", minimum=20)] = 180

The command line, its help, the environment variables, the keys of edgefed.toml and the reference page are all made from
these fields (`edgefed.cli.options`). Flags win over EDGEFED_VERB_OPTION variables, these over edgefed.toml, and that
over the defaults. The file has one table per verb, with keys in kebab-case as on the command line:

    [serve]
    method = "hfedmoe"
    min-clients = 3
    option = ["lambda=0.25", "beta=1"]
"""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from edgefed.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Setting:
    """Help text and limits of one field.

    ``default``: what the help shows where the field's own default is None. ``minimum`` and ``maximum`` are inclusive,
    ``above`` is an exclusive lower limit. ``flag``: name on the command line where it differs from the field's.
    ``formerly``: an old name, refused with a hint. ``variable``: environment variable, if not EDGEFED_VERB_OPTION.
    ``secret``: the flag takes @FILE only, because other users can read command lines. ``positional``: an argument
    without a flag. ``hidden``: for the Python API only.
    """

    help: str = ""
    default: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    metavar: str | None = None
    flag: str | None = None
    formerly: str | None = None
    variable: str | None = None
    secret: bool = False
    positional: bool = False
    hidden: bool = False


@dataclasses.dataclass(frozen=True)
class SettingField:
    """One setting of a settings class, with its type taken apart.

    ``kind`` is bool, int, float, str or Path. ``many``: how many values it takes: "one", "two", "any" (repeatable), or
    "pairs" (repeatable NAME=VALUE). ``default`` is MISSING where the setting is required.
    """

    name: str
    setting: Setting
    kind: type
    choices: tuple[str, ...]
    many: Literal["one", "two", "any", "pairs"]
    default: Any

    @property
    def flag(self) -> str:
        """Name in kebab-case, as in ``--flag`` and in edgefed.toml."""
        return self.setting.flag or self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether the setting has no default."""
        return self.default is dataclasses.MISSING


def fields_of(settings: type) -> list[SettingField]:
    """The settings of a dataclass, in order; those that are for the Python API only are left out."""
    hints = typing.get_type_hints(settings, include_extras=True)
    found = []
    for field in dataclasses.fields(settings):
        hint, *extras = typing.get_args(hints[field.name])
        setting = next(extra for extra in extras if isinstance(extra, Setting))
        if setting.hidden:
            continue
        kind, choices, many = _take_apart(hint)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found.append(SettingField(field.name, setting, kind, choices, many, default))
    return found


def _take_apart(hint: Any) -> tuple[type, tuple[str, ...], Literal["one", "two", "any", "pairs"]]:
    """(kind, choices, many) of an annotation. Of a union, the command line takes a Literal, str, or Path.

    str before Path, which would turn ./name into name: a hub id where no such folder exists.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        order = (str, Path)
        literal = next((member for member in members if typing.get_origin(member) is Literal), None)
        preferred = next((member for member in order if member in members), None)
        return _take_apart(literal or preferred or members[0])
    if origin is Literal:
        return str, tuple(typing.get_args(hint)), "one"
    if origin is collections.abc.Mapping:
        return str, (), "pairs"
    if origin is tuple:
        first, second = typing.get_args(hint)
        return first, (), "any" if second is Ellipsis else "two"
    return hint, (), "one"


def check_settings(settings: Any) -> None:
    """Raise ConfigError, with all errors at once, for values outside the limits or choices of their fields."""
    errors = []
    for field in fields_of(type(settings)):
        value, limits = getattr(settings, field.name), field.setting
        if value is None or (field.many != "one" and not field.choices):
            continue
        if field.choices and value not in field.choices:
            errors.append(f"invalid `{field.name}`: {value!r}; expected {', '.join(field.choices)}")
        elif limits.above is not None and not value > limits.above:
            errors.append(f"invalid `{field.name}`: {value}; expected more than {limits.above:g}")
        elif limits.minimum is not None and not value >= limits.minimum:
            errors.append(f"invalid `{field.name}`: {value}; expected at least {limits.minimum:g}")
        elif limits.maximum is not None and not value <= limits.maximum:
            errors.append(f"invalid `{field.name}`: {value}; expected at most {limits.maximum:g}")
    if errors:
        raise ConfigError("; ".join(errors))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError when it cannot be read or is invalid."""
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return tables
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def load_settings(path: Path, known: Mapping[str, Mapping[str, SettingField]]) -> dict[str, dict[str, object]]:
    """Read a settings file into {verb: {field name: value}}.

    ``known`` maps the keys of each verb's table to its settings. Raises ConfigError, with all errors at once, for an
    unreadable file, invalid TOML, and an unknown table or key.
    """
    settings: dict[str, dict[str, object]] = {}
    errors = []
    for verb, table in read_toml(path).items():
        if verb not in known or not isinstance(table, dict):
            errors.append(f"[{verb}] is not a table of settings; the tables are {', '.join(sorted(known))}")
            continue
        settings[verb] = {}
        renamed = {field.setting.formerly: field.flag for field in known[verb].values() if field.setting.formerly}
        for key, value in table.items():
            if key in known[verb]:
                settings[verb][known[verb][key].name] = value
            else:
                hint = f": use {renamed[key]!r}" if key in renamed else ""
                errors.append(f"[{verb}] has no setting {key!r}{hint}")
    if errors:
        raise ConfigError(f"{path}: " + "; ".join(errors))
    return settings


def parse_assignments(pairs: tuple[str, ...], setting: str) -> dict[str, str]:
    """Read repeated ``NAME=VALUE`` texts. Raises ConfigError for one without name or equals sign, or given twice."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ConfigError(f"invalid `{setting}`: {pair!r} is not NAME=VALUE")
        if name in values:
            raise ConfigError(f"`{setting}` sets {name} twice: to {values[name]!r} and {value!r}")
        values[name] = value
    return values


def parse_share(value: str | float, setting: str, *, zero: bool = False) -> float:
    """Read a share such as ``25%`` or ``0.25``: above 0 (with ``zero`` also 0), at most 1. Raises ConfigError."""
    text = str(value).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not (0 < share <= 1 or (zero and share == 0)):
        allowed = "a share from 0 to 1" if zero else "a share above 0, at most 1"
        hint = f". Did you mean {share:g}%?" if 1 < share <= 100 and not text.endswith("%") else ""
        raise ConfigError(f"invalid `{setting}`: {value!r}; expected {allowed}, such as 25% or 0.25{hint}")
    return share
