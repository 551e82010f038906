"""Transfers and errors over real loopback sockets."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import re
import socket
import ssl
import threading

import httpx
import pytest
from fake_aggregator import REFUSED

from edgefed.agent.addresses import check_base_url
from edgefed.agent.channel import connection_error
from edgefed.agent.transport import AggregatorClient
from edgefed.api.client import Client
from edgefed.errors import (
    ChecksumMismatch,
    ConfigError,
    DiskFull,
    InvalidUpdate,
    MalformedMessage,
    NetworkError,
    NotFound,
    OffsetMismatch,
    ProtocolError,
    RoundClosed,
    ServerUnreachable,
    StorageError,
    Unauthorized,
    UnknownClient,
)
from edgefed.protocol.messages import Assignment, Heartbeat, Register, UpdateMeta, Wait

CLIENT, KEY = "c" * 32, "k" * 64


def register(client: AggregatorClient) -> None:
    client.register(
        Register(
            protocol_version=1,
            client_id=CLIENT,
            client_key=KEY,
            name="n",
            memory_bytes=1,
            expert_share=1.0,
            compute_share=1.0,
            num_examples=1,
            edgefed_version="0",
        )
    )


def meta_of(data: bytes, server_round: int = 1, attempt: int = 1) -> UpdateMeta:
    return UpdateMeta(
        client_id=CLIENT,
        server_round=server_round,
        attempt=attempt,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        num_examples=1,
        num_tokens=1,
        experts=(),
        metrics={},
    )


@pytest.fixture
def client(server):
    with AggregatorClient(server.url, CLIENT, KEY, read_s=5, write_s=5) as client:
        register(client)
        yield client


@pytest.fixture
def flaky(server, proxy):
    server.quorum = 2  # one update closes no round, so it may be any bytes
    with AggregatorClient(proxy.url, CLIENT, KEY, read_s=5, write_s=5) as client:
        register(client)
        yield client


def blob_of(server, size: int) -> tuple[str, bytes]:
    data = os.urandom(size)
    return server.add_blob(data), data


def test_addresses():
    assert check_base_url("http://Host:8470/") == "http://host:8470"
    assert check_base_url("https://[::1]:9") == "https://[::1]:9"
    for wrong in (
        "host:8470", "192.168.1.5", "ftp://host", "http://", "http://host/v1/clients", "http://host?x=1",
        "http://user:pass@host", "http://host:99999999", "http://host:0", "http://host:abc", "http://ho st", "", "http://host/#x",
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            check_base_url(wrong)
        assert caught.value.remedy.startswith("Pass the address")


@pytest.mark.parametrize("token", [" blank", "line\nbreak", "ümlaut"])
def test_token_must_fit_a_header(token):
    with pytest.raises(ConfigError, match="token"):
        AggregatorClient("http://127.0.0.1:1", token=token)


def test_messages_and_their_errors(server, client):
    assert client.assignment(0.1) == Assignment(server_round=1, deadline_s=None, seed=1)
    assert client.manifest(1) == client.manifest("latest")
    client.heartbeat(Heartbeat(phase="train", fraction=0.5, server_round=1))
    client.leave("bye")
    assert server.heartbeats[0].fraction == 0.5
    assert server.left == ["bye"]
    with pytest.raises(NotFound):
        client.manifest(9)
    with AggregatorClient(server.url, "unknown", KEY) as other, pytest.raises(UnknownClient):
        other.assignment(0.1)
    with AggregatorClient(server.url, CLIENT, "wrong") as other, pytest.raises(Unauthorized):
        other.assignment(0.1)
    assert client.bytes_down > 500
    assert client.bytes_up > 100


def test_token(server, client):
    server.token = "secret"
    with pytest.raises(Unauthorized):
        client.manifest(1)
    with AggregatorClient(server.url, CLIENT, KEY, "secret") as known:
        known.manifest(1)
        known.assignment(0.1)


def test_long_poll_outlives_the_read_timeout(server):
    server.quorum = 2
    with AggregatorClient(server.url, CLIENT, KEY, read_s=0.3) as client:
        register(client)
        data = b"x"
        server.partial[(CLIENT, 1, 1)] = bytearray(data)
        client.commit(meta_of(data))
        assert isinstance(client.assignment(0.8), Wait)


def test_busy_servers_are_unreachable_and_errors_keep_their_status(server, client):
    for status in (408, 429, 500, 502, 503):
        server.fail.append(("manifests", status, 1))
        with pytest.raises(ServerUnreachable, match=str(status)) as caught:
            client.manifest(1)
        assert caught.value.received_status == status
    server.fail.append(("manifests", DiskFull("server disk"), 1))
    with pytest.raises(DiskFull, match="server disk") as full:
        client.manifest(1)
    assert full.value.received_status == 507
    server.fail.append(("manifests", REFUSED, 1))
    with pytest.raises(InvalidUpdate):
        client.manifest(1)


def test_closed_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with AggregatorClient(f"http://127.0.0.1:{port}") as client, pytest.raises(ServerUnreachable, match="no answer"):
        client.status()


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (200, "text/html", b"<html>router</html>"),
        (404, "text/html", b"nothing"),
        (302, "text/html", b""),
        (200, "", b""),
    ],
)
def test_another_kind_of_server_is_recognised(status, kind, body):
    class Page(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    pages = http.server.HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=pages.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        with AggregatorClient(f"http://127.0.0.1:{pages.server_port}", CLIENT, KEY) as client:
            with pytest.raises(ProtocolError, match="not answer as an edgefed server") as caught:
                register(client)
            assert caught.value.foreign
    finally:
        pages.shutdown()
        pages.server_close()


def test_a_server_that_does_not_speak_http():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            for _ in range(2):  # the second one asks whether it speaks TLS
                connection, _ = listener.accept()
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-OpenSSH_9.0\r\n")
                connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with AggregatorClient(url, read_s=5) as client, pytest.raises(ServerUnreachable):
            client.status()
        thread.join(5)


def test_https_to_a_server_of_plain_http_is_said_at_once(server, tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    address = server.url.replace("http://", "https://")
    for url in (address, f"{address}#sha256:{'0' * 64}"):
        with AggregatorClient(url) as client, pytest.raises(ConfigError, match="speaks plain HTTP") as caught:
            client.status()
        assert "http://127.0.0.1" in caught.value.remedy
    joining = Client(address, data=str(tmp_path / "text.txt"), state=tmp_path / "me")
    with pytest.raises(ConfigError, match="speaks plain HTTP"):
        joining.run()


def test_untrusted_certificate_is_a_network_error_of_its_own(tmp_path):
    """Retrying does not make a certificate trusted, so it must not look like an unreachable server."""
    failure = httpx.ConnectError("handshake failed")
    cause = ssl.SSLCertVerificationError(1, "certificate verify failed")
    cause.verify_message = "self-signed certificate"
    failure.__cause__ = httpx.TransportError("wrapped")
    failure.__cause__.__context__ = cause
    error = connection_error(failure, "https://127.0.0.1:1")
    assert type(error) is NetworkError
    assert "self-signed certificate" in str(error)
    assert error.foreign


def test_oversized_message_is_refused(server, client, monkeypatch):
    monkeypatch.setattr("edgefed.protocol.routes.MAX_MESSAGE_BYTES", 100)
    with pytest.raises(MalformedMessage, match="more than 100 bytes"):
        client.manifest(1)


# --- downloads ----------------------------------------------------------------------------------------------------


def test_download_continues_byte_exactly_after_cuts(server, proxy, flaky, tmp_path):
    sha256, data = blob_of(server, 1_000_000)
    proxy.cut_down += [200_000, 300_000, 150_000]
    path, failures, moved = tmp_path / "blob", 0, []
    for _ in range(10):
        try:
            flaky.download(sha256, len(data), path, moved.append)
            break
        except ServerUnreachable:
            failures += 1
            assert not path.exists()
    assert path.read_bytes() == data
    assert failures == 3
    assert proxy.cuts_made == 3
    starts = [start for _, start in server.blob_requests]
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert len(starts) == 4
    assert sum(moved) == len(data)  # no byte came twice
    assert not (tmp_path / "blob.part").exists()


def test_download_from_a_server_without_range_starts_again(server, client, tmp_path):
    sha256, data = blob_of(server, 50_000)
    (tmp_path / "blob.part").write_bytes(data[:20_000])
    server.ignore_range = True
    client.download(sha256, len(data), tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == data


def test_complete_and_empty_parts_need_no_request(server, client, tmp_path):
    sha256, data = blob_of(server, 5000)
    (tmp_path / "blob.part").write_bytes(data)
    client.download(sha256, len(data), tmp_path / "blob")
    client.download(hashlib.sha256(b"").hexdigest(), 0, tmp_path / "empty")
    assert (tmp_path / "blob").read_bytes() == data
    assert (tmp_path / "empty").read_bytes() == b""
    assert server.blob_requests == []


@pytest.mark.parametrize("junk", [b"\0" * 3000, b"\0" * 9000])
def test_damaged_part_costs_one_more_download(server, client, tmp_path, junk):
    sha256, data = blob_of(server, 5000)
    (tmp_path / "blob.part").write_bytes(junk)
    client.download(sha256, len(data), tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == data


def test_wrong_bytes_once_and_twice(server, client, tmp_path):
    sha256, data = blob_of(server, 5000)
    server.corrupt_blobs[sha256] = 1
    client.download(sha256, len(data), tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == data
    server.corrupt_blobs[sha256] = 2
    with pytest.raises(ChecksumMismatch, match=sha256[:12]):
        client.download(sha256, len(data), tmp_path / "other")
    assert [file.name for file in tmp_path.iterdir()] == ["blob"]


@pytest.mark.parametrize("size", [4000, 6000])
def test_wrong_size_never_fills_the_disk(server, client, tmp_path, size):
    sha256, _ = blob_of(server, 5000)
    with pytest.raises(ChecksumMismatch):
        client.download(sha256, size, tmp_path / "blob")
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_hash_is_not_used_as_a_path(client, tmp_path):
    for sha256 in ("../../etc/passwd", "A" * 64, "", "0" * 63):
        with pytest.raises(MalformedMessage):
            client.download(sha256, 1, tmp_path / "x")
    with pytest.raises(NotFound):
        client.download("0" * 64, 1, tmp_path / "x")


def test_a_full_disk_raises_disk_full(server, client, tmp_path, monkeypatch):
    sha256, data = blob_of(server, 5000)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgefed.agent.cache.sync_file", full)
    with pytest.raises(DiskFull):
        client.download(sha256, len(data), tmp_path / "blob")
    with pytest.raises(StorageError):
        client.download(sha256, len(data), tmp_path / "no-such-folder" / "blob")


# --- uploads ------------------------------------------------------------------------------------------------------


def test_upload_continues_at_the_servers_offset(server, proxy, flaky, tmp_path):
    data = os.urandom(1_000_000)
    (tmp_path / "update").write_bytes(data)
    proxy.cut_up += [400_000, 300_000]
    failures = 0
    for _ in range(10):
        try:
            flaky.upload(1, 1, tmp_path / "update")
            break
        except ServerUnreachable:
            failures += 1
    assert bytes(server.partial[(CLIENT, 1, 1)]) == data
    assert failures == 2
    assert sum(taken for _, taken in server.puts) == len(data)  # every byte was taken once
    assert [offset for offset, _ in server.puts][0] == 0
    assert server.puts[-1][0] > 0
    accepted = flaky.commit(meta_of(data))
    assert not accepted.repeated
    assert flaky.commit(meta_of(data)).repeated
    assert len(server.accepted) == 1


def test_an_upload_reports_the_known_offset_and_each_chunk(server, client, tmp_path):
    data = os.urandom(600_000)
    (tmp_path / "update").write_bytes(data)
    server.partial[(CLIENT, 1, 1)] = bytearray(data[:100_000])
    moved: list[int] = []
    client.upload(1, 1, tmp_path / "update", moved.append)
    assert moved[0] == 100_000
    assert sum(moved) == len(data)
    assert bytes(server.partial[(CLIENT, 1, 1)]) == data
    client.upload(1, 1, tmp_path / "update")
    assert len(server.puts) == 1  # complete: nothing is sent again


def test_empty_file_needs_no_put(server, client, tmp_path):
    (tmp_path / "update").write_bytes(b"")
    client.upload(1, 1, tmp_path / "update")
    assert server.puts == []


def test_an_offset_mismatch_asks_for_the_offset_again(server, client, tmp_path):
    data = os.urandom(1000)
    (tmp_path / "update").write_bytes(data)
    server.fail.append(("PUT", OffsetMismatch("elsewhere"), 2))
    client.upload(1, 1, tmp_path / "update")
    assert bytes(server.partial[(CLIENT, 1, 1)]) == data
    server.fail.append(("PUT", OffsetMismatch("elsewhere"), 99))
    with pytest.raises(ProtocolError, match="without taking any"):
        client.upload(1, 2, tmp_path / "update")
    assert server.fail[0][2] == 99 - 3


def test_upload_errors(server, client, tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "update").write_bytes(data)
    server.partial[(CLIENT, 1, 1)] = bytearray(len(data) + 1)
    with pytest.raises(ChecksumMismatch, match="more|has 300001"):
        client.upload(1, 1, tmp_path / "update")
    server.server_round = 2
    with pytest.raises(RoundClosed):
        client.upload(1, 1, tmp_path / "update")
    with pytest.raises(StorageError):
        client.upload(2, 1, tmp_path / "gone")


def test_an_upload_is_split_where_a_proxy_limits_the_size_of_a_request(server, client, tmp_path, caplog):
    data = os.urandom(700_000)
    (tmp_path / "update").write_bytes(data)
    server.body_limit = 200_000
    offsets: list[int] = []
    client.upload(1, 1, tmp_path / "update", on_offset=offsets.append)
    assert bytes(server.partial[(CLIENT, 1, 1)]) == data
    assert offsets == sorted(offsets)
    assert offsets[-1] == len(data)
    assert all(taken <= 200_000 for _, taken in server.puts)
    refused = len(re.findall("body limit", caplog.text))
    assert refused == 2, "700 kB, 350 kB; then 175 kB fit"
    client.upload(1, 2, tmp_path / "update")
    assert len(re.findall("body limit", caplog.text)) == refused, "the size is learned once"


def test_a_proxy_that_refuses_every_body_is_named(server, client, tmp_path):
    (tmp_path / "update").write_bytes(os.urandom(300_000))
    server.body_limit = 10
    with pytest.raises(ProtocolError, match="a proxy in front of .* refuses the size") as caught:
        client.upload(1, 1, tmp_path / "update")
    assert "client_max_body_size" in caught.value.remedy
    assert len([entry for entry in server.log if entry[0] == "PUT"]) < 8


def test_a_full_disk_of_the_server_is_not_reported_as_local(server, client, tmp_path):
    (tmp_path / "update").write_bytes(b"x" * 1000)
    server.fail.append(("PUT", DiskFull("cannot write an upload: No space left on device"), 1))
    with pytest.raises(DiskFull, match="the server http.* reports") as caught:
        client.upload(1, 1, tmp_path / "update")
    assert "on the server" in caught.value.remedy


@pytest.fixture
def hostile():
    """serve(body, **headers) -> client of a server that answers every request with ``body``."""
    servers, clients = [], []

    def serve(body: bytes, status: int = 200, **headers: str) -> AggregatorClient:
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        clients.append(AggregatorClient(f"http://127.0.0.1:{servers[-1].server_port}", CLIENT, KEY, read_s=5))
        return clients[-1]

    yield serve
    for each in clients:
        each.close()
    for each in servers:
        each.shutdown()
        each.server_close()


@pytest.mark.parametrize("status", [200, 500])
def test_a_compressed_answer_is_refused_before_it_is_read(hostile, status):
    packed = gzip.compress(b"x" * 10**7)
    with pytest.raises(ProtocolError, match=r"sends a compressed answer \(gzip\)"):
        hostile(packed, status, content_encoding="gzip").assignment(0)


def test_texts_of_a_server_reach_the_terminal_without_control_characters(hostile):
    reply = hostile(b'{"type": "wait", "retry_after_s": 1.0, "reason": "\\u001b]0;owned\\u0007 wait"}').assignment(0)
    assert reply == Wait(retry_after_s=1.0, reason=" ]0;owned  wait")
    error = b'{"code": "round-closed", "message": "\\u001b[2Jgone", "remedy": "\\u0007"}'
    with pytest.raises(RoundClosed, match=r"^ \[2Jgone$"):
        hostile(error, 410).assignment(0)


def test_a_manifest_that_could_write_outside_its_folder_is_refused(hostile):
    manifest = (
        b'{"run_id": "r", "server_round": 1, "experts_per_layer": [], "units": [], '
        b'"files": [{"name": "../x", "sha256": "", "size_bytes": 1}]}'
    )
    with pytest.raises(MalformedMessage, match="invalid file name"):
        hostile(manifest).manifest()
