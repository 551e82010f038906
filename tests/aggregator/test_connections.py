"""Limits on connections, on guesses of the token, and on the log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
import types
from collections.abc import Iterator

import h11
import pytest
import toy_run
from server_process import Client
from toy_run import make_run

from edgefed.agent.transport import AggregatorClient
from edgefed.aggregator.connections import ConnectionLimits, EndQuietly, connection_limits
from edgefed.aggregator.gate import FREE_GUESSES, GuessBrake, LogLimiter, address_of, check_strength
from edgefed.aggregator.server import AggregatorServer, ServerConfig
from edgefed.errors import ConfigError, MalformedMessage, Unauthorized, UnknownClient
from edgefed.protocol import routes
from edgefed.protocol.signing import new_key

TOKEN = "correct-horse-battery"
LIMITS = ConnectionLimits(at_once=40, strangers=8, head_s=1.0, body_pause_s=1.0, read_pause_s=1.0)


@pytest.fixture
def server(tmp_path) -> Iterator[AggregatorServer]:
    """A server in this process, with small limits and a blob of 4 MB."""
    ready = threading.Event()
    config = ServerConfig(state_folder=make_run(tmp_path / "state", hidden=65536), port=0, token=TOKEN, limits=LIMITS)
    running = AggregatorServer(config, on_ready=lambda _: ready.set(), make_method=toy_run.make_method)
    thread = threading.Thread(target=running.run)
    thread.start()
    assert ready.wait(20)
    yield running
    running.stop()
    thread.join(20)
    assert not thread.is_alive()


def connect(server: AggregatorServer, first: bytes = b"") -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=5)
    peer.sendall(first)
    return peer


def closes_within(peer: socket.socket, seconds: float) -> bool:
    """Whether the server ends the connection without an answer in this time."""
    peer.settimeout(seconds)
    try:
        while peer.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def test_idle_strangers_do_not_lock_out_clients(server):
    with contextlib.ExitStack() as held:
        for _ in range(60):
            held.enter_context(connect(server))
        client = Client(server.url, "a", token=TOKEN)
        client.register()
        for _ in range(20):
            held.enter_context(connect(server))
        assert client.status().state == "waiting"
        assert Client(server.url, "b", token=TOKEN).register().status_code == 200


@pytest.mark.parametrize("first", [b"", b"GET /v1/health HTTP/1.1\r\nhost: x\r\n"])
def test_a_request_that_does_not_come_is_not_waited_for(server, first):
    with connect(server, first) as peer:
        assert closes_within(peer, 5)


def test_only_a_connection_without_a_request_is_worth_a_warning(server, caplog):
    with connect(server, b"GET /v1/health HTTP/1.1\r\nhost: x\r\n\r\n") as peer:  # a client that then loads its model
        assert closes_within(peer, 5)
    assert "closing a connection" not in caplog.text
    with connect(server) as peer:
        assert closes_within(peer, 5)
    assert "closing a connection: no complete request" in caplog.text


def test_a_body_that_stops_is_not_waited_for(server):
    Client(server.url, "a", token=TOKEN).register()
    head = f"POST /v1/clients HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: 900\r\n\r\n{{"
    with connect(server, head.encode()) as peer:
        assert closes_within(peer, 5)


def test_a_reader_that_stops_is_not_waited_for(server):
    client = Client(server.url, "a", token=TOKEN)
    client.register()
    blob = max(client.manifest().units, key=lambda unit: unit.size_bytes).sha256
    request = f"GET /v1/blobs/{blob} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode()
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        peer.sendall(request * 20)
        until = time.monotonic() + 8
        while server.endpoints.transfers == 0 and time.monotonic() < until:
            time.sleep(0.02)
        while server.endpoints.transfers and time.monotonic() < until:
            time.sleep(0.05)
        assert server.endpoints.transfers == 0


def test_an_idle_client_keeps_its_connection(server):
    client = Client(server.url, "a", token=TOKEN)
    client.register()
    time.sleep(2.5)
    assert client.status().state == "waiting"


def test_who_it_is_comes_before_a_large_body(server):
    client = Client(server.url, "a", token=TOKEN)
    client.register()
    with pytest.raises(MalformedMessage, match="at most 65536 bytes"):
        client.request("POST", routes.REGISTER, content=b" " * 100_000)
    commit = routes.COMMIT.replace("{client_id}", "nobody")
    with pytest.raises(UnknownClient):
        client.request("POST", commit, values={"server_round": 1, "attempt": 1}, content=b" " * 1_000_000)


def test_guesses_of_the_token_are_slowed_and_right_ones_still_pass(server):
    for _ in range(FREE_GUESSES):
        with pytest.raises(Exception, match="wrong token"):
            Client(server.url, "a", token="wrong-guess").status()
    started = time.monotonic()
    assert Client(server.url, "a", token=TOKEN).status().state == "waiting"
    assert time.monotonic() - started > 0.9


@pytest.mark.parametrize(("token", "message"), [("wrong" * 5, "^wrong token"), ("", "needs a token or an invitation")])
def test_a_wrong_token_is_not_called_a_missing_one(server, token, message):
    with (
        AggregatorClient(server.url, "a", toy_run.KEY + "a", device_key=new_key(), token=token) as client,
        pytest.raises(Unauthorized, match=message),
    ):
        client.register(toy_run.register_message("a"))


def test_at_most_some_guesses_of_an_address_wait():
    async def guess() -> list[bool]:
        brake = GuessBrake()
        return await asyncio.gather(*(brake.wait("x") for _ in range(6)))

    assert sorted(asyncio.run(guess())) == [False, False, True, True, True, True]


def test_the_brake_is_released_after_a_while():
    now = [0.0]
    brake = GuessBrake(clock=lambda: now[0])
    for _ in range(FREE_GUESSES):
        assert not brake.brakes("x")
        brake.note_wrong("x")
    assert brake.brakes("x")
    assert not brake.brakes("y")
    now[0] = 61.0
    assert not brake.brakes("x")


@pytest.mark.parametrize("token", ["a", "short-token", "aaaaaaaaaaaaaaaaaaaa", " correct-horse-battery"])
def test_weak_tokens_are_refused(token):
    with pytest.raises(ConfigError):
        check_strength(token)


def test_addresses():
    assert address_of({"client": ("2001:db8:1:2:3:4:5:6", 1)}) == address_of({"client": ("2001:db8:1:2::9", 2)})
    assert address_of({"client": ("192.0.2.1", 1)}) == "192.0.2.1"
    assert address_of({"client": None}) == ""


def test_a_kind_of_line_is_limited_and_counted(caplog):
    now = [0.0]
    logger = logging.getLogger("test.limited")
    logger.addFilter(LogLimiter(clock=lambda: now[0]))
    with caplog.at_level(logging.WARNING, "test.limited"):
        for number in range(50):
            logger.warning("bad request %d", number)
        logger.warning("another kind")
        now[0] = 61.0
        logger.warning("bad request %d", 50)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 22
    assert messages[-1] == "bad request 50 (30 more such lines were left out)"


def test_limits_follow_the_file_descriptors():
    limits = connection_limits()
    assert 8 <= limits.strangers <= limits.at_once // 2


def test_a_request_that_cannot_be_answered_ends_with_its_connection():
    """h11 raises if the answer to an invalid request comes after uvicorn's own."""
    aborted = []

    async def raising(scope, receive, send) -> None:
        raise h11.LocalProtocolError("can't handle event type Response")

    connection = types.SimpleNamespace(transport=types.SimpleNamespace(abort=lambda: aborted.append(1)))
    asyncio.run(EndQuietly(raising, lambda: None)({"type": "http", "state": {"connection": connection}}, None, None))
    assert aborted == [1]
