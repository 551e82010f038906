"""Fixtures of the aggregator tests: a small run on disk, a service over it, real servers that end with their test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # toy_run and server_process are plain modules

import server_process  # noqa: E402
import toy_run  # noqa: E402


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Httpx obeys proxy variables; loopback must not go through one."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(autouse=True)
def _no_open_clients() -> Iterator[None]:
    yield
    server_process.Client.close_all()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state folder of a new toy run."""
    return toy_run.make_run(tmp_path / "state")


@pytest.fixture
def toy(state: Path) -> Iterator[toy_run.Toy]:
    """The run open in this process, with a clock that only the test moves."""
    opened = toy_run.Toy(state)
    yield opened
    opened.close()


@pytest.fixture
def start_server() -> Iterator[Callable[..., server_process.ServerProcess]]:
    started: list[server_process.ServerProcess] = []

    def start(*args: object, **options: object) -> server_process.ServerProcess:
        started.append(server_process.ServerProcess(*args, **options))
        return started[-1]

    yield start
    for server in started:
        server.kill()
