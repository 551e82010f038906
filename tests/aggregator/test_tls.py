"""TLS: the server's own certificate or a self-signed one, and clients that accept only the one they know."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy_run
from toy_run import make_run, register_message

from edgefed.agent.addresses import parse_link
from edgefed.agent.transport import AggregatorClient
from edgefed.aggregator.connections import ConnectionLimits
from edgefed.aggregator.server import AggregatorServer, ServerConfig
from edgefed.aggregator.tls import make_certificate
from edgefed.errors import ConfigError, NetworkError

TOKEN = "correct-horse-battery"
LIMITS = ConnectionLimits(at_once=40, strangers=8, head_s=1.0)


@contextlib.contextmanager
def serving(state: Path, **options: object) -> Iterator[AggregatorServer]:
    ready = threading.Event()
    config = ServerConfig(**{"state_folder": state, "port": 0, "token": TOKEN, "limits": LIMITS, **options})
    server = AggregatorServer(config, on_ready=lambda _: ready.set(), make_method=toy_run.make_method)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20)
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[AggregatorServer]:
    """A server that other machines could reach, with a self-signed certificate."""
    with serving(make_run(tmp_path_factory.mktemp("tls") / "state", hidden=4096), host="0.0.0.0") as running:
        yield running


def test_a_client_with_the_whole_address_is_served_over_tls(server, tmp_path):
    assert server.join_url.startswith("https://127.0.0.1:")
    with AggregatorClient(server.join_url, "a", toy_run.KEY + "a", TOKEN) as client:
        assert client.base_url == server.url
        client.register(register_message("a"))
        unit = client.manifest().units[1]
        client.download(unit.sha256, unit.size_bytes, tmp_path / "blob")
    assert (tmp_path / "blob").stat().st_size == unit.size_bytes


def test_another_certificate_and_an_unknown_one_are_refused(server):
    link = parse_link(server.join_url)
    address, pin = link.address, link.pin
    wrong = f"{address}#sha256:{'0' * 64}"
    with AggregatorClient(wrong, token=TOKEN) as client, pytest.raises(NetworkError, match=f"fingerprint is {pin}"):
        client.status()
    with AggregatorClient(address, token=TOKEN) as client, pytest.raises(NetworkError, match="not trusted") as caught:
        client.status()
    assert "#sha256" in caught.value.remedy


def test_plain_http_is_not_answered_and_the_client_says_why(server):
    address = server.url.replace("https", "http")
    with AggregatorClient(address, token=TOKEN) as client, pytest.raises(ConfigError, match="speaks HTTPS") as caught:
        client.status()
    assert "#sha256" in caught.value.remedy


def test_handshakes_that_do_not_come_lock_nobody_out(server):
    port = int(server.url.rsplit(":", 1)[1])
    with contextlib.ExitStack() as held:
        peers = [held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(30)]
        with AggregatorClient(server.join_url, token=TOKEN) as client:
            assert client.status().state == "waiting"
        until = time.monotonic() + 6
        peers[-1].settimeout(6)
        with contextlib.suppress(ConnectionError):
            assert peers[-1].recv(1) == b""
        assert time.monotonic() < until


def test_the_certificate_and_its_key_stay_with_the_run_and_are_private(tmp_path):
    state, found = make_run(tmp_path / "state"), []
    for _ in range(2):
        with serving(state, host="0.0.0.0") as server:
            found.append(parse_link(server.join_url).pin)
    assert found[0] == found[1]
    assert (state / "tls" / "key.pem").stat().st_mode & 0o077 == 0


def test_a_certificate_of_an_authority(tmp_path):
    certificate, key = make_certificate("127.0.0.1")
    (tmp_path / "c.pem").write_bytes(certificate)
    (tmp_path / "k.pem").write_bytes(key)
    context = ssl.create_default_context(cafile=str(tmp_path / "c.pem"))
    files = {"certificate": tmp_path / "c.pem", "certificate_key": tmp_path / "k.pem"}
    with serving(make_run(tmp_path / "state"), **files) as server:
        assert server.join_url == server.url
        with AggregatorClient(server.url, token=TOKEN, verify=context) as client:
            assert client.status().state == "waiting"


def test_plain_http_beyond_this_machine_must_be_asked_for(tmp_path):
    with serving(make_run(tmp_path / "state"), host="0.0.0.0", plain_http=True) as server:
        assert server.join_url.startswith("http://")


@pytest.mark.parametrize("address", ["https://h:1#sha256:12", "http://h:1#sha256:" + "a" * 64])
def test_invalid_fingerprints_are_named(address):
    with pytest.raises(ConfigError, match="invalid fingerprint"):
        AggregatorClient(address)


def test_files_that_are_no_certificate_are_named(tmp_path):
    (tmp_path / "c.pem").write_text("nothing")
    files = {"certificate": tmp_path / "c.pem", "certificate_key": tmp_path / "c.pem"}
    for options, says in (
        (files, "cannot use the certificate"),
        ({"certificate": tmp_path / "c.pem"}, "belong together"),
    ):
        with pytest.raises(ConfigError, match=says):
            AggregatorServer(
                ServerConfig(state_folder=make_run(tmp_path / says[:4]), port=0, **options),
                make_method=toy_run.make_method,
            )
