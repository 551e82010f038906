"""Run functions in a worker process with a time limit, so that a crash or a hang cannot harm the caller.

A broken wheel dies of an illegal instruction, and a driver that lost its GPU hangs: both become findings. The worker
(`child.py`) is started again after each death.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO

from edgefed.errors import EdgefedError, all_errors

TAIL_BYTES = 4096
"""How much of a dead worker's stderr is read for its last words."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``value`` is what the check returned; or ``failure`` says in a sentence why there is none.

    ``error`` is the edgefed error that the check raised, where it was one; ``died`` is True when the check took its
    process down or did not end.
    """

    value: object = None
    failure: str = ""
    error: EdgefedError | None = None
    died: bool = False

    @property
    def ok(self) -> bool:
        """Whether the check returned a value."""
        return not self.failure


class Worker:
    """A process for checks; use it in a ``with``. ``extra_environment`` is set before its first import."""

    def __init__(self, extra_environment: dict[str, str] | None = None):
        self._environment = {**os.environ, **(extra_environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process. Idempotent."""
        self._end(patience_s=1.0)
        self._stderr.close()

    def call(self, target: str, timeout_s: float, **arguments: object) -> Outcome:
        """Run ``package.module:function(**arguments)`` there and wait at most ``timeout_s`` for what it returns.

        Arguments and result travel as JSON. Never raises for what the check does.
        """
        if self._process is None:
            try:
                self._start()
            except OSError as caught:
                return Outcome(failure=f"no process could be started for it: {caught.strerror or caught}")
        request = {"target": target, "arguments": arguments, "timeout_s": timeout_s}
        try:
            self._send(request)
            line = self._replies.get(timeout=timeout_s)
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            self._end()
            return Outcome(failure=f"did not end within {timeout_s:g} s", died=True)
        if not line.endswith("\n"):
            return Outcome(failure=self._last_words(), died=True)
        reply = json.loads(line)
        if "raised" not in reply:
            return Outcome(reply["value"])
        raised = reply["raised"]
        kind = all_errors().get(raised.get("code") or "")
        error = kind(raised["text"], remedy=raised.get("remedy")) if kind else None
        return Outcome(failure=f"{'' if kind else raised['type'] + ': '}{raised['text']}", error=error)

    def _start(self) -> None:
        script = Path(__file__).with_name("child.py")
        self._stderr.seek(0)
        self._stderr.truncate()
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=self._environment,
            text=True,
            encoding="utf-8",
            start_new_session=os.name == "posix",  # so that a compiler that it started can be ended with it
        )
        self._replies = queue.SimpleQueue()
        assert self._process.stdout is not None
        threading.Thread(target=_forward, args=(self._process.stdout, self._replies), daemon=True).start()
        with contextlib.suppress(BrokenPipeError):  # a worker that died at once is found by the next send
            self._send({"path": sys.path})

    def _send(self, message: dict[str, object]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _end(self, patience_s: float = 0.0) -> None:
        """Let the process end by itself within ``patience_s``, then kill it and everything that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            if process.stdin is not None:
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
        process.wait()

    def _last_words(self) -> str:
        """Why a worker stopped responding: ``killed by SIGILL (...); it said: ...``."""
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2.0)
        end = describe_exit(process.poll())
        self._end()
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - TAIL_BYTES))
        lines = [line.strip() for line in self._stderr.read().decode("utf-8", "replace").splitlines()]
        said = next((line for line in reversed(lines) if line), "")
        return f"{end}{'; it said: ' + said if said else ''}"


def describe_exit(status: int | None) -> str:
    """An exit status in words: a signal by its name."""
    if status is None:
        return "closed its output and went on"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        meaning = {
            "SIGILL": "an instruction that this processor does not have: the package was built for a newer one",
            "SIGSEGV": "invalid memory access: a package does not fit this system's libraries",
            "SIGBUS": "invalid memory access: the disk or the memory may be full",
            "SIGABRT": "a library gave up",
            "SIGKILL": "killed from outside: the memory may have run out",
        }.get(name, "")
        return f"killed by {name}{' (' + meaning + ')' if meaning else ''}"
    return f"ended by itself with exit status {status}"


def _forward(stream: IO[str], replies: queue.SimpleQueue[str]) -> None:
    """Move lines to the queue, then close the stream. An empty line means that no more will come."""
    with stream:
        for line in stream:
            replies.put(line)
    replies.put("")
