"""Start a module of this package in a process of its own."""

from __future__ import annotations

import sys


def module_command(module: str) -> list[str]:
    """The command that runs ``module`` with the import path of this process.

    ``python -m`` would look into the current folder first, and there may be a checkout: another edgefed, without its
    compiled libraries. Until the module handles SIGINT, one ends the process without a traceback.
    """
    code = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        f"sys.path[:] = {sys.path!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code]
