"""Takes secrets off the command line, where every user of the machine can read them: tokens, and join links."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

FLAG = "--token"
VARIABLE = "EDGEFED_TOKEN"
INVITATION, INVITATION_VARIABLE = "invite:", "EDGEFED_INVITATION"


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


def without_invitation(words: Sequence[str]) -> tuple[list[str], str | None]:
    """``words`` without the invitation of a join link, and that invitation."""
    left: list[str] = []
    found = None
    for word in words:
        address, mark, fragment = word.partition("#")
        parts = fragment.split(",") if mark and "://" in address else []
        kept = [part for part in parts if not part.startswith(INVITATION)]
        for part in parts:
            found = part[len(INVITATION) :] if part.startswith(INVITATION) else found
        left.append(word if len(kept) == len(parts) else "#".join([address, ",".join(kept)]).rstrip("#"))
    return left, found


def hide_secrets() -> None:
    """Start this process anew with the secrets in its environment, which only its owner can read. POSIX only.

    They are visible until then, some hundredths of a second; the notice says how to avoid that. An invitation is used
    up by the device that joins with it.
    """
    words, token = without_token(sys.argv[1:])
    words, invitation = without_invitation(words)
    if token is None and invitation is None:
        return
    from edgefed.cli.output import print_note

    hidden = {}
    if token is not None:
        hidden[VARIABLE] = token
        print_note(
            f"other users of this machine could read the token on the command line; moved to {VARIABLE}. "
            f"Give {FLAG} @FILE, or set {VARIABLE}"
        )
    if invitation is not None:
        hidden[INVITATION_VARIABLE] = invitation
    sys.stderr.flush()
    kept = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]  # the interpreter, its options and our script
    os.execve(sys.executable, [*kept, *words], {**os.environ, **hidden})
