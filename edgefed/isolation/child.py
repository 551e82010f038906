"""The other end of `edgefed.isolation.worker`: a process that runs functions and may die of them.

Started as a script, not as a module, so that nothing but the standard library is imported before the parent's
``sys.path`` is in place. Reads one JSON request a line from stdin and answers with one JSON line each:

    {"path": [...]}                                                                  first, no answer
    {"target": "package.module:function", "arguments": {...}, "timeout_s": 60}    -> {"value": ...} or {"raised": ...}

What the checks and their libraries print goes to stderr. A hung check ends the process from a thread of the
interpreter itself, even when nobody is left who would kill it.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import sys
from typing import Any

GRACE_S = 5.0
"""Seconds beyond a check's limit before the worker ends itself; its parent acts first."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Call the target. An exception is an answer, too: its type, text, and what an edgefed error carries beyond."""
    try:
        module, _, function = request["target"].partition(":")
        return {"value": getattr(importlib.import_module(module), function)(**request["arguments"])}
    except Exception as error:  # whatever a broken package raises is the finding
        kind = type(error).__name__
        return {
            "raised": {
                "type": kind,
                "text": str(error) or kind,
                "code": getattr(error, "code", None),
                "remedy": getattr(error, "remedy", None),
            }
        }


def main() -> None:
    """Answer requests from stdin until it is closed."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path[:] = json.loads(sys.stdin.readline())["path"]
    for line in sys.stdin:
        request = json.loads(line)
        # A debugger's and a sandbox's stderr may have no descriptor; the parent's time limit stands without this one.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            faulthandler.dump_traceback_later(request["timeout_s"] + GRACE_S, exit=True)
        reply = answer(request)
        faulthandler.cancel_dump_traceback_later()
        try:
            text = json.dumps(reply)
        except (TypeError, ValueError) as error:
            text = json.dumps({"raised": {"type": "TypeError", "text": f"{request['target']}: {error}"}})
        replies.write(text + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
