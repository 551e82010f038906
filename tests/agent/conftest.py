"""Loopback servers and helpers of the agent tests. Every wait here has an end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # agent_rig, fake_aggregator, ... are plain modules

from fake_aggregator import FakeAggregator  # noqa: E402
from flaky_proxy import FlakyProxy  # noqa: E402


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Httpx obeys proxy variables; loopback must not go through one."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAggregator]:
    fake = FakeAggregator(tmp_path_factory.mktemp("server"))
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def proxy(server: FakeAggregator) -> Iterator[FlakyProxy]:
    flaky = FlakyProxy(server.port)
    yield flaky
    flaky.close()


@pytest.fixture
def wait_until() -> Callable[[Callable[[], object], float], None]:
    def wait(condition: Callable[[], object], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the condition never became true"
            time.sleep(0.01)

    return wait
