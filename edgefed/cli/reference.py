"""The reference page of the command line, made from the same settings as the commands themselves."""

from __future__ import annotations

import inspect

from edgefed.cli.examples import EXAMPLES
from edgefed.cli.main import VERBS, verb_command
from edgefed.cli.options import SettingsCommand, default_text, variable_of
from edgefed.cli.phrasing import to_flags
from edgefed.config import SettingField

INTRODUCTION = """\
# Command line

`edgefed [--config FILE] COMMAND [-v | -q | --log-level LEVEL]`

`-v` (`--log-level debug`) shows more, `-q` neither notices nor progress; both may stand before or after the command.
`serve` and `join` write JSON, one object a line, with `--log-format json`.
Colors appear on a terminal only, and not with `NO_COLOR` or `TERM=dumb`. Exit status 130 means Ctrl-C; the other
statuses are on the page of errors.

Shell completion of commands, options and their values:

```
eval "$(_EDGEFED_COMPLETE=bash_source edgefed)"                                                        # in ~/.bashrc
eval "$(_EDGEFED_COMPLETE=zsh_source edgefed)"                                                         # in ~/.zshrc
_EDGEFED_COMPLETE=fish_source edgefed > ~/.config/fish/completions/edgefed.fish                        # once, in fish
```

Settings come from flags, then environment variables, then the table of the command in `edgefed.toml`, then defaults. A
key of `edgefed.toml` is the flag without its dashes.
"""


def reference() -> str:
    """Return the Markdown of every command: usage, help text and a table of its settings."""
    return "\n".join([INTRODUCTION, *(_section(verb, verb_command(verb)) for verb in VERBS)])


def _section(verb: str, command: SettingsCommand) -> str:
    arguments = " ".join(_argument(field) for field in command.fields if field.setting.positional)
    usage = f"edgefed {verb} {arguments}".strip()
    lines = [f"## edgefed {verb}", "", f"```\n{usage} [OPTIONS]\n```", "", inspect.cleandoc(command.help or ""), ""]
    lines += ["```", *(f"{line}  # {comment}" for comment, line in EXAMPLES.get(verb, ())), "```", ""]
    lines += ["| setting | value | default | environment | meaning |", "| --- | --- | --- | --- | --- |"]
    flags = {field.name: f"--{field.flag}" for field in command.fields}
    for field in command.fields:
        positional = field.setting.positional
        cells = (
            _argument(field) if positional else f"`--{field.flag}`",
            _values(field),
            "required" if field.required else to_flags(default_text(field) or "", flags),
            "" if positional else f"`{variable_of(verb, field)}`",
            to_flags(field.setting.help, flags),
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _argument(field: SettingField) -> str:
    name = field.name.upper()
    return name if field.required else f"[{name}]"


def _values(field: SettingField) -> str:
    """What a setting takes: choices, a range, or the kind of value."""
    setting = field.setting
    if field.choices:
        return ", ".join(f"`{choice}`" for choice in field.choices)
    if field.kind is bool:
        return "flag"
    text = setting.metavar or {"int": "integer", "float": "number", "Path": "path"}.get(field.kind.__name__, "text")
    limits = [
        f"{words} {limit:g}"
        for words, limit in (("above", setting.above), ("at least", setting.minimum), ("at most", setting.maximum))
        if limit is not None
    ]
    repeatable = ", repeatable" if field.many in ("any", "pairs") else ""
    return f"{text}{' ' if limits else ''}{', '.join(limits)}{repeatable}"
