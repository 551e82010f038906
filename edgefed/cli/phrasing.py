"""Settings as flags: the library writes `memory` or `expert_storage=full`, the command line shows flags.

to_flags("Raise `memory` or set `expert_storage=full`.")  ->  "Raise --memory or set --expert-storage full."
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

_SETTING = re.compile(r'`([a-z][a-z0-9_]*)(?:="?([^`"]*)"?)?`')


def to_flags(text: str, flags: Mapping[str, str] | None = None) -> str:
    """Replace each setting in backticks with its flag. Other text in backticks, such as `tiny`, stays as it is.

    ``flags``: flag of each setting that is replaced; None: those of all verbs.
    """

    def flag_of(match: re.Match[str]) -> str:
        name, value = match.groups()
        flag = (_flags() if flags is None else flags).get(name)
        if flag is None:
            return match[0]
        return flag if value is None else f"{flag} {value}"

    return _SETTING.sub(flag_of, text)


@functools.cache
def _flags() -> dict[str, str]:
    """Name of each setting -> its flag."""
    from edgefed.cli.main import VERBS, cli, verb_command

    flags = {field.name: f"--{field.flag}" for verb in VERBS for field in verb_command(verb).fields}
    return flags | {param.opts[0].lstrip("-").replace("-", "_"): param.opts[0] for param in cli.params}
