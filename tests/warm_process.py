"""Processes for tests that start with torch and transformers already loaded.

A cold `python -m edgefed` spends seconds on imports. A `WarmProcess` is forked from a server that has imported them,
and is otherwise a process of its own: own pid, working directory, environment, output file, signals and exit status.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = ("torch", "transformers", "numpy", "httpx", "uvicorn", "starlette", "click", "rich")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["warm_imports"])


def _run(arguments: Sequence[str], log: str, cwd: str | None, environment: Mapping[str, str]) -> None:
    """In the child: take the place of ``python ARGUMENTS``."""
    with contextlib.suppress(AttributeError):
        os.setsid()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.default_int_handler)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    if arguments[0] == "-m":
        sys.argv = [arguments[1], *arguments[2:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


class WarmProcess:
    """``python ARGUMENTS`` (``-m module ...`` or ``script.py ...``) with stdout and stderr in ``log``.

    Has the parts of `subprocess.Popen` that tests use: ``pid``, ``poll``, ``wait``, ``send_signal``, ``terminate``,
    ``kill``, ``returncode`` (negative for a signal).
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        log: Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ):
        log.touch()
        words = [str(word) for word in arguments]
        environment = dict(os.environ if env is None else env)
        self._process = _context.Process(
            target=_run, args=(words, str(log), str(cwd) if cwd is not None else os.getcwd(), environment)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} is still running after {timeout} s")
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_warm(arguments: Sequence[object], *, log: Path, timeout: float = 120, **options) -> tuple[int, str]:
    """Run to the end; (exit status, output). The process is killed when ``timeout`` seconds have passed."""
    process = WarmProcess(arguments, log=log, **options)
    until = time.monotonic() + timeout
    try:
        return process.wait(until - time.monotonic()), log.read_text()
    finally:
        process.kill()
