"""Settings as flags: the library writes `memory` or `expert_storage=full`, the command line shows flags.

    to_flags("Raise `memory` or set `expert_storage=full`.")  ->  "Raise --memory or set --expert-storage full."
"""

from __future__ import annotations

import functools
import re

_SETTING = re.compile(r'`([a-z][a-z0-9_]*)(?:="?([^`"]*)"?)?`')


def to_flags(text: str) -> str:
    """Replace each setting in backticks with its flag. Other text in backticks, such as `tiny`, stays as it is."""
    return _SETTING.sub(_flag, text)


def _flag(match: re.Match[str]) -> str:
    name, value = match.groups()
    if name not in _known_settings():
        return match[0]
    flag = f"--{name.replace('_', '-')}"
    return flag if value is None else f"{flag} {value}"


@functools.cache
def _known_settings() -> frozenset[str]:
    from edgefed.cli.main import setting_names

    return setting_names()
