"""Where settings come from: flags, then EDGEFED_* variables, then edgefed.toml, then defaults.

Flags and variables are read by the command line; this module reads the file. A file has one table per verb, keys in
kebab-case as on the command line:

    [serve]
    method = "hfedmoe"
    min-clients = 3
    option = ["lambda=0.25", "beta=1"]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from edgefed.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_settings(path: Path, known: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, object]]:
    """Read a settings file into {verb: {parameter: value}}.

    ``known`` maps, for each verb, the keys that a file may hold to the parameters that they set. Raises ConfigError,
    naming every fault at once, for an unreadable file, broken TOML, and an unknown verb or key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    settings: dict[str, dict[str, object]] = {}
    faults = []
    for verb, table in tables.items():
        if verb not in known or not isinstance(table, dict):
            faults.append(f"[{verb}] is no table of settings; the tables are {', '.join(sorted(known))}")
            continue
        settings[verb] = {}
        for key, value in table.items():
            if key in known[verb]:
                settings[verb][known[verb][key]] = value
            else:
                faults.append(f"[{verb}] has no setting {key!r}")
    if faults:
        raise ConfigError(f"{path}: " + "; ".join(faults))
    return settings


def parse_assignments(pairs: tuple[str, ...], flag: str) -> dict[str, str]:
    """Read repeated ``NAME=VALUE`` flags. Raises ConfigError for one without name or equals sign, or given twice."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ConfigError(f"{flag} {pair!r} is not NAME=VALUE")
        if name in values:
            raise ConfigError(f"{flag} gives {name} twice: {values[name]!r} and {value!r}")
        values[name] = value
    return values


def parse_share(text: str, flag: str) -> float:
    """Read a share such as ``25%`` or ``0.25``; above 0, at most 1. Raises ConfigError."""
    stripped = text.strip()
    try:
        value = float(stripped[:-1]) / 100 if stripped.endswith("%") else float(stripped)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ConfigError(f"{flag} is {text!r}, expected a share above 0 such as 25% or 0.25")
    return value
