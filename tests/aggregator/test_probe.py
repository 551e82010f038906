"""The probe routes: what they transfer, and limits that protect the connection; options of the server's sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx
import pytest
import toy_run

from edgefed.aggregator import wire
from edgefed.aggregator.probing import WINDOW_S, ProbeLimiter, ProbeLimits
from edgefed.aggregator.server import AggregatorServer, ServerConfig, bind
from edgefed.errors import MalformedMessage, NetworkError, Unauthorized
from edgefed.protocol import probe, routes
from edgefed.protocol.messages import decode_error

TOKEN = "a token of probes"


@contextlib.contextmanager
def serving(state, **options):
    ready = threading.Event()
    server = AggregatorServer(
        ServerConfig(state_folder=state, port=0, token=TOKEN, **options),
        on_ready=lambda _: ready.set(),
        make_method=toy_run.make_method,
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def server(state):
    with serving(state) as running:
        yield running


@pytest.fixture
def http(server):
    headers = {routes.TOKEN_HEADER: f"Bearer {TOKEN}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=15.0, trust_env=False) as client:
        yield client


def refusal_of(response: httpx.Response, status: int) -> Exception:
    assert response.status_code == status
    return decode_error(response.content)


# --- the routes -----------------------------------------------------------------------------------------------------


def test_a_download_has_the_requested_size(http):
    for size in (1, 1000, probe.PROBE_BLOCK_BYTES, probe.PROBE_BLOCK_BYTES + 1, 300_001):
        body = http.get(routes.PROBE, params={"bytes": size}).content
        assert len(body) == size
    assert len(set(body[:1000])) > 200, "random, so that no link compresses it"


def test_the_reply_to_an_upload_contains_its_marks(http, state):
    before = sorted(path for path in state.rglob("*") if path.is_file())
    marks = http.post(routes.PROBE, content=bytes(1_000_000)).json()["marks"]
    assert 2 <= len(marks) <= probe.MAX_MARKS + 2
    assert marks[0][0] == 0.0
    assert marks[-1][1] == 1_000_000
    assert marks == sorted(marks)
    assert sorted(path for path in state.rglob("*") if path.is_file()) == before, "nothing of it may reach the disk"


@pytest.mark.parametrize("size", ["", "0", "-1", "1.5", "many", str(probe.MAX_PROBE_BYTES + 1), "9" * 30])
def test_sizes_are_checked(http, size):
    assert isinstance(refusal_of(http.get(routes.PROBE, params={"bytes": size}), 400), MalformedMessage)


def test_an_upload_needs_a_length_within_the_limit(http):
    assert isinstance(refusal_of(http.get(routes.PROBE), 400), MalformedMessage)
    assert isinstance(refusal_of(http.post(routes.PROBE, content=iter([b"x"])), 400), MalformedMessage)
    assert isinstance(refusal_of(http.post(routes.PROBE, content=b""), 400), MalformedMessage)
    too_large = bytes(probe.MAX_PROBE_BYTES + 1)
    assert isinstance(refusal_of(http.post(routes.PROBE, content=too_large), 400), MalformedMessage)


def test_probes_need_a_client_key(server):
    with httpx.Client(base_url=server.url, timeout=15.0, trust_env=False) as stranger:
        assert isinstance(refusal_of(stranger.get(routes.PROBE, params={"bytes": 10}), 401), Unauthorized)
        assert isinstance(refusal_of(stranger.post(routes.PROBE, content=b"x"), 401), Unauthorized)


def slow_upload(server: AggregatorServer, size: int, sent: bytes) -> socket.socket:
    """A POST that promises ``size`` bytes and stops after ``sent``."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = f"POST {routes.PROBE} HTTP/1.1\r\nhost: x\r\n{routes.TOKEN_HEADER}: Bearer {TOKEN}\r\n"
    connection.sendall(f"{head}content-length: {size}\r\n\r\n".encode() + sent)
    return connection


def wait_until_running(server: AggregatorServer, count: int) -> None:
    end = time.monotonic() + 10
    while server.endpoints.probes.active != count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_probe_at_a_time_per_address(server, http):
    with slow_upload(server, 1000, b"x"):
        wait_until_running(server, 1)
        for response in (http.get(routes.PROBE, params={"bytes": 10}), http.post(routes.PROBE, content=bytes(100))):
            assert isinstance(refusal_of(response, 429), NetworkError)
            assert response.headers["retry-after"] == "1"
    wait_until_running(server, 0)  # it hung up
    assert http.get(routes.PROBE, params={"bytes": 10}).status_code == 200


def test_a_refused_upload_is_not_read_to_its_end(server):
    with slow_upload(server, 1000, b"x"):
        wait_until_running(server, 1)
        with slow_upload(server, 8_000_000, bytes(500_000)) as second:
            second.settimeout(wire.DRAIN_S / 2)  # other refused bodies are waited for as long as that
            answer = b""
            with contextlib.suppress(ConnectionResetError):  # what was not read makes the end a reset
                while chunk := second.recv(65536):
                    answer += chunk
            assert answer.startswith(b"HTTP/1.1 429 ")
            assert b"connection: close" in answer.lower()


def test_an_endless_upload_is_answered_in_time(server, monkeypatch):
    monkeypatch.setattr(probe, "MAX_PROBE_S", 0.2)
    with slow_upload(server, 1000, b"x" * 10) as connection:
        answer = b""
        while chunk := connection.recv(65536):  # the server hangs up after it
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["marks"] == [[0.0, 10]]
    wait_until_running(server, 0)


def test_a_download_on_a_slow_line_ends_in_time_with_a_complete_reply(server, http, monkeypatch):
    monkeypatch.setattr(probe, "MAX_PROBE_S", 0.0)
    response = http.get(routes.PROBE, params={"bytes": 1000})
    assert response.status_code == 200
    assert len(response.content) < 1000


def test_a_client_that_does_not_read_loses_its_place(server, monkeypatch):
    monkeypatch.setattr(probe, "MAX_PROBE_S", 0.1)
    monkeypatch.setattr("edgefed.aggregator.probing.LATE_S", 0.2)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        head = f"GET {routes.PROBE}?bytes={probe.MAX_PROBE_BYTES} HTTP/1.1\r\nhost: x\r\n"
        connection.sendall(f"{head}{routes.TOKEN_HEADER}: Bearer {TOKEN}\r\n\r\n".encode())
        assert connection.recv(1)
        wait_until_running(server, 0)


def test_a_server_stops_during_a_probe(state):
    with serving(state) as server:
        connection = slow_upload(server, 1000, b"x")
        wait_until_running(server, 1)
    connection.close()


# --- the limits -----------------------------------------------------------------------------------------------------


class Clock:
    now = 500.0

    def __call__(self) -> float:
        return self.now


def limiter_of(clock: Clock, **limits: int) -> ProbeLimiter:
    return ProbeLimiter(ProbeLimits(**limits), clock)


def test_limit_of_bytes_per_address_and_minute():
    clock = Clock()
    limiter = limiter_of(clock, address_bytes=100)
    for at, size in ((0, 60), (10, 40)):
        clock.now = 500.0 + at
        assert limiter.wait_s("a", size) == 0
        with limiter.running("a", size):
            pass
    clock.now = 520.0
    assert limiter.wait_s("a", 1) == pytest.approx(WINDOW_S - 20), "the first 60 bytes must be a minute old"
    assert limiter.wait_s("a", 61) == pytest.approx(WINDOW_S - 10), "for 61, all 100"
    assert limiter.wait_s("b", 100) == 0
    clock.now = 500.0 + WINDOW_S
    assert limiter.wait_s("a", 60) == 0
    assert limiter.wait_s("a", 61) > 0


def test_limits_of_requests_and_bytes_of_all_addresses():
    clock = Clock()
    limiter = limiter_of(clock, all_bytes=1000, all_requests=3, address_requests=2)
    for number, address in enumerate(["a", "a", "b"]):
        clock.now = 500.0 + number
        assert limiter.wait_s(address, 1) == 0
        with limiter.running(address, 1):
            pass
    assert limiter.wait_s("c", 1) == pytest.approx(WINDOW_S - 2)
    clock.now = 500.0 + WINDOW_S
    assert limiter.wait_s("c", 1) == 0
    waits = [limiter.wait_s(address, size) for address, size in (("a", 998), ("c", 999), ("c", 1000))]
    assert waits == pytest.approx([0.0, 1.0, 2.0]), "a and b still hold a byte each"


def test_limit_of_concurrent_probes():
    limiter = limiter_of(Clock(), address_at_once=2, all_at_once=3)
    with contextlib.ExitStack() as stack:
        for address in "aab":
            assert limiter.wait_s(address, 1) == 0
            stack.enter_context(limiter.running(address, 1))
        assert limiter.wait_s("a", 1) == limiter.wait_s("c", 1) == 1.0
    assert limiter.wait_s("a", 1) == 0
    assert limiter.active == 0
    assert limiter.num_entries == 3, "only the requests of the last minute"


def test_a_measurement_in_both_directions_fits_the_limits():
    limits = ProbeLimits()
    sizes = [probe.PROBE_BLOCK_BYTES << step for step in range(8)]
    assert sizes[-1] == probe.MAX_PROBE_BYTES
    assert 2 * sum(sizes) <= limits.address_bytes
    assert 2 * len(sizes) <= limits.address_requests


def test_the_limiter_has_bounded_memory():
    clock = Clock()
    limiter = ProbeLimiter(clock=clock)
    admitted = 0
    for number in range(5000):
        clock.now += 0.001
        if not limiter.wait_s(f"10.0.{number // 256}.{number % 256}", 1):
            with limiter.running(f"10.0.{number // 256}.{number % 256}", 1):
                admitted += 1
    assert admitted == ProbeLimits().all_requests == limiter.num_entries


# --- sockets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_small_replies_are_sent_without_delay(host):
    """Nagle's algorithm must be off on every connection that the server accepts: it costs 40 ms for each blob."""
    try:
        listener = bind(host, 0)
    except NetworkError:
        pytest.skip("no IPv6 here")

    async def look() -> int:
        seen = asyncio.get_running_loop().create_future()

        def greet(_, writer):
            seen.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(greet, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            answer = await asyncio.wait_for(seen, 10)
            writer.close()
            return answer

    with listener:
        assert asyncio.run(look()) != 0
