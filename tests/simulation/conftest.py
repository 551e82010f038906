"""Real `edgefed` processes that end with their test."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "agent"))  # toy_device, agent_rig
WAIT_S = 120


@pytest.fixture
def processes():
    """Start ``python ARGUMENTS`` (in ``cwd``); whatever still runs at the end is killed by its pid."""
    started: list[subprocess.Popen] = []

    def start(*arguments: object, log: Path, cwd: Path | None = None) -> subprocess.Popen:
        command = [sys.executable, *map(str, arguments)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=cwd)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def wait_for():
    """Poll ``condition`` until it is true, a bounded time."""

    def wait(condition, what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen within {WAIT_S} s"
            time.sleep(0.05)

    return wait


@pytest.fixture
def serve(processes, wait_for, tmp_path):
    """`edgefed serve` on a free port; returns (process, url)."""

    def start(*flags: object) -> tuple[subprocess.Popen, str]:
        ready = tmp_path / "ready.json"
        ready.unlink(missing_ok=True)
        log = tmp_path / "server.log"
        arguments = ("-m", "edgefed", "serve", "--port", 0, "--ready-file", ready, "--state", tmp_path / "run", *flags)
        server = processes(*arguments, log=log)
        wait_for(lambda: ready.exists() or server.poll() is not None, "the server's start")
        assert server.poll() is None, log.read_text()
        return server, json.loads(ready.read_text())["url"]

    return start
