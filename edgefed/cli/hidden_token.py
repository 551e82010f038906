"""Takes a token off the command line, where every user of the machine can read it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

FLAG = "--token"
VARIABLE = "EDGEFED_TOKEN"


def without_token(words: Sequence[str]) -> tuple[list[str], str | None]:
    """``words`` without a token that is given as text, and that token. `--token @FILE` stays."""
    left: list[str] = []
    token = None
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if word == "--":
            left += [word, *rest]
            break
        if flag != FLAG:
            left.append(word)
            continue
        if not equals:
            value = next(rest, "@")  # without a value: click reports it
            if value == "@":
                left.append(word)
                continue
        if value.startswith("@") or not value:
            left += [word] if equals else [word, value]
        else:
            token = value
    return left, token


def hide_token() -> None:
    """Start this process anew with the token in its environment, which only its owner can read. POSIX only.

    The token is visible until then, some hundredths of a second; the notice says how to avoid that.
    """
    words, token = without_token(sys.argv[1:])
    if token is None:
        return
    from edgefed.cli.output import print_note

    print_note(
        f"other users of this machine could read the token on the command line; moved to {VARIABLE}. "
        f"Give {FLAG} @FILE, or set {VARIABLE}"
    )
    sys.stderr.flush()
    kept = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]  # the interpreter, its options and our script
    os.execve(sys.executable, [*kept, *words], {**os.environ, VARIABLE: token})
