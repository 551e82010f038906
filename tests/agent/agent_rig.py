"""Agents for the tests: one inside this process, one as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from toy_device import ToyTrainer

from edgefed.agent.agent import Agent, AgentSettings, open_agent
from edgefed.agent.backoff import BackoffSchedule, Retry

ROOT = Path(__file__).parents[2]


class Memo:
    """A progress sink that remembers."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int | None]] = []
        self.advanced: dict[str, int] = {}
        self.messages: list[str] = []

    def phase(self, name: str, total: int | None = None, unit: str = "B") -> None:
        self.phases.append((name, total))
        self.advanced[name] = 0

    def advance(self, n: int) -> None:
        self.advanced[self.phases[-1][0]] += n

    def message(self, text: str) -> None:
        self.messages.append(text)

    def done(self) -> None:
        pass


@contextlib.contextmanager
def device(
    url: str,
    state: Path,
    trainer: ToyTrainer | None = None,
    *,
    stop: threading.Event | None = None,
    memo: Memo | None = None,
    give_up_after_s: float = 5.0,
    final_evaluation: str = "never",
) -> Iterator[Agent]:
    """An agent with quick waits."""
    stop = stop or threading.Event()
    settings = AgentSettings(
        name="toy", memory_bytes=1 << 30, poll_s=1.0, give_up_after_s=give_up_after_s, final_evaluation=final_evaluation
    )  # fmt: skip
    retry = Retry(stop, schedule=BackoffSchedule(first_s=0.02, cap_s=0.05))
    with open_agent(url, state, settings, trainer or ToyTrainer(), stop=stop, progress=memo, retry=retry) as agent:
        yield agent


def ledger(state: Path) -> list[dict]:
    return [json.loads(line) for line in (state / "ledger.jsonl").read_text().splitlines()]


def start(agent: Agent) -> tuple[threading.Thread, list]:
    """Run an agent in a thread; its summary or its error lands in the list."""
    ends: list = []

    def work() -> None:
        try:
            ends.append(agent.run())
        except Exception as error:
            ends.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, ends


class Device:
    """One run of toy_device.py; always ends with the test."""

    def __init__(self, url: str, state: Path, step_s: float = 0.0, death: str = "") -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("toy_device.py")), url, str(state), str(step_s)]
            + [death] * bool(death),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)

    def read_until(self, prefix: str) -> None:
        """Read lines up to one that begins with ``prefix``; the caller's test has a time limit."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(prefix):
                return
        raise AssertionError(f"the device ended before {prefix!r}: {self.process.stderr.read()}")

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait(10) == -signal.SIGKILL

    def finish(self, seconds: float = 20) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err
