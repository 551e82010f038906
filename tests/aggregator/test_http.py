"""The server over loopback: routes, streams, refusals. One process for the tests that leave no trace behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import toy_run
from server_process import Client, ServerProcess
from toy_run import make_run, make_update, trained

from edgefed.aggregator.rounds import RoundPolicy
from edgefed.aggregator.server import ServerConfig, bind, check_token, run_server
from edgefed.errors import (
    ConfigError,
    EdgefedError,
    InvalidUpdate,
    MalformedMessage,
    MissingToken,
    NetworkError,
    NotFound,
    OffsetMismatch,
    PortInUse,
    RoundClosed,
    StateLocked,
    Unauthorized,
    UnknownClient,
    UpdateConflict,
    UpdateTooLarge,
)
from edgefed.protocol import routes
from edgefed.protocol.messages import Assignment, Finished, Heartbeat, Leave, Wait, encode_message

TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server with a token whose round never closes: it waits for 60 clients."""
    state = make_run(tmp_path_factory.mktemp("shared") / "state", min_clients=60)
    server = ServerProcess(state, token=TOKEN)
    yield server
    server.kill()


@pytest.fixture
def client(shared) -> Client:
    joined = Client(shared.url, "a", token=TOKEN)
    joined.register()
    return joined


def updates_for(manifest, clients: str, share: float = 1.0) -> dict[str, toy_run.Update]:
    units = [unit for unit in manifest.units if unit.trainable]
    some = units[: round(len(units) * share)]
    return {c: make_update(manifest, c, trained(some, ord(c)), num_examples=ord(c)) for c in clients}


# --- doors ------------------------------------------------------------------------------------------------------


def test_every_route_but_health_needs_a_token(shared):
    assert httpx.get(shared.url + routes.HEALTH).json() == {"status": "ok", "protocol_version": 1}
    for token in (None, "wrong", TOKEN + "x"):
        stranger = Client(shared.url, "a", token=token)
        for verb, path in (("GET", routes.STATUS), ("POST", routes.REGISTER), ("GET", "/v1/nothing")):
            with pytest.raises(Unauthorized, match="token"):
                stranger.request(verb, path)
    response = httpx.get(shared.url + routes.STATUS, headers={"authorization": f"bearer {TOKEN}"})
    assert response.status_code == 200  # RFC 9110: the scheme is read in either case


def test_every_refusal_is_an_error_reply(shared, client):
    cases = [
        ("GET", "/v1/nothing", {}, 404, NotFound),
        ("DELETE", routes.STATUS, {}, 405, NotFound),
        ("POST", routes.REGISTER, {"content": b"{"}, 400, MalformedMessage),
        ("POST", routes.REGISTER, {"content": b'{"client_id": 3}'}, 400, MalformedMessage),
        ("POST", routes.REGISTER, {"content": b"[" * 100_000}, 400, MalformedMessage),
        ("POST", routes.REGISTER, {"content": b"\xff" * 10}, 400, MalformedMessage),
        ("POST", routes.HEARTBEAT, {"content": b"{}"}, 400, MalformedMessage),
        ("GET", routes.ASSIGNMENT, {"params": {"wait_s": "soon"}}, 400, MalformedMessage),
        ("GET", routes.ASSIGNMENT, {"params": {"wait_s": "nan"}}, 400, MalformedMessage),
        ("GET", routes.MANIFEST, {"values": {"server_round": "-1"}}, 400, MalformedMessage),
        ("GET", routes.MANIFEST, {"values": {"server_round": "9" * 5000}}, 400, MalformedMessage),
        ("GET", routes.MANIFEST, {"values": {"server_round": "²"}}, 400, MalformedMessage),
        ("GET", routes.MANIFEST, {"values": {"server_round": 7}}, 404, NotFound),
        ("GET", routes.BLOB, {"values": {"sha256": "0" * 64}}, 404, NotFound),
        ("GET", routes.BLOB, {"values": {"sha256": "../../edgefed.db"}}, 404, NotFound),
        ("PUT", routes.UPLOAD, {"values": {"server_round": 1, "attempt": "x"}, "params": {"offset": 0}}, 400, None),
        ("PUT", routes.UPLOAD, {"values": {"server_round": 1, "attempt": 1}}, 400, MalformedMessage),
        ("PUT", routes.UPLOAD, {"values": {"server_round": 1, "attempt": 1}, "params": {"offset": -1}}, 400, None),
    ]
    for verb, path, arguments, status, kind in cases:
        values = arguments.pop("values", {})
        url = routes.path_for(path, client_id="a", **values)
        response = client.http.request(verb, url, **arguments)
        assert response.status_code == status, (verb, url, response.text)
        reply = response.json()
        assert reply["message"], url
        assert reply["remedy"], url
        assert reply["code"] == (kind or MalformedMessage).code, url


@pytest.mark.parametrize("client_id", ["..", "../../x", "..%2f..%2fx", "a.b", "%00", "a" * 65, "CON.", "a\\b", "ä"])
def test_a_client_id_that_could_leave_the_folder_is_refused(shared, client_id):
    before = set(Path(shared.log.parent).rglob("*"))
    stranger = Client(shared.url, client_id, token=TOKEN)
    with pytest.raises((MalformedMessage, NotFound)):
        stranger.register()
    with pytest.raises((MalformedMessage, NotFound)):
        stranger.request(
            "PUT", routes.UPLOAD, values={"server_round": 1, "attempt": 1}, params={"offset": 0}, content=b"x"
        )
    assert set(Path(shared.log.parent).rglob("*")) == before


def test_hostile_headers_and_bodies_are_refused(shared, client):
    port = int(shared.url.rsplit(":", 1)[1])
    for raw in (
        b"\x00\xff\x00\xff\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nhost: x\r\nauthorization: Bearer \xff\xfe\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nhost: x\r\n" + b"a: " + b"b" * 3_000_000 + b"\r\n\r\n",
        b"PUT /v1/clients/a/rounds/1/uploads/1?offset=0 HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    ):
        hung_up = contextlib.suppress(ConnectionError)
        with socket.create_connection(("127.0.0.1", port), timeout=5) as peer, hung_up:
            peer.sendall(raw)
            assert b"200 OK" not in peer.recv(65536).split(b"\r\n")[0]
    path = routes.path_for(routes.ASSIGNMENT, client_id="a")
    assert client.http.get(path, headers={routes.CLIENT_KEY_HEADER: b"\xe4\xff"}).status_code == 401
    assert isinstance(client.assignment(), Wait)
    with pytest.raises(MalformedMessage, match="at most"):
        client.request("POST", routes.REGISTER, content=b" " * (routes.MAX_MESSAGE_BYTES + 1))


def test_an_unknown_client_and_a_wrong_key(shared, client):
    with pytest.raises(UnknownClient):
        Client(shared.url, "nobody", token=TOKEN).assignment()
    thief = Client(shared.url, "a", token=TOKEN, key="x" * 32)
    with pytest.raises(Unauthorized):
        thief.assignment()
    with pytest.raises(Unauthorized):
        thief.register(client_key="x" * 32)


# --- downloads --------------------------------------------------------------------------------------------------


def test_blobs_are_served_whole_and_in_ranges(client):
    manifest = client.manifest()
    unit = manifest.units[-1]
    whole = client.blob(unit.sha256)
    assert whole.status_code == 200
    assert whole.headers["content-length"] == str(unit.size_bytes)
    assert hashlib.sha256(whole.content).hexdigest() == unit.sha256
    size = unit.size_bytes
    for header, begin, end in (
        ("bytes=10-", 10, size), ("bytes=0-0", 0, 1), ("bytes=5-9", 5, 10), (f"bytes={size - 1}-", size - 1, size),
        (f"bytes=3-{size * 9}", 3, size),
    ):  # fmt: skip
        part = client.blob(unit.sha256, headers={"range": header})
        assert part.status_code == 206
        assert part.content == whole.content[begin:end]
        assert part.headers["content-range"] == f"bytes {begin}-{end - 1}/{size}"
    for header in (f"bytes={size}-", "bytes=9-3"):
        response = client.request(
            "GET", routes.BLOB, values={"sha256": unit.sha256}, headers={"range": header}, expect=(416,)
        )
        assert response.headers["content-range"] == f"bytes */{size}"
        assert response.json()["code"] == "not-found"
    for header in ("bytes=-5", "bytes=0-1,3-4", "furlongs=1-2", "bytes=0-"):
        assert client.blob(unit.sha256, headers={"range": header}).content == whole.content
    assert client.blob(manifest.files[0].sha256).json() == {"model_type": "toy"}


def test_downloads_are_counted_for_the_client_whose_key_is_sent(shared):
    counted = Client(shared.url, "counted", token=TOKEN)
    counted.register()
    unit = counted.manifest().units[0]
    counted.blob(unit.sha256)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        status = next(c for c in counted.status().clients if c.client_id == "counted")
        if status.downloaded_bytes:
            break
    assert status.downloaded_bytes == unit.size_bytes


def test_the_status_contains_clients_and_memory(client):
    client.request(
        "POST", routes.HEARTBEAT, content=encode_message(Heartbeat(phase="profiling", fraction=0.5, server_round=0))
    )
    status = client.status()
    assert (status.state, status.min_clients, status.quorum, status.deadline_s) == ("waiting", 60, 0, None)
    mine = next(c for c in status.clients if c.client_id == "a")
    assert (mine.phase, mine.fraction, mine.state, mine.name) == ("profiling", 0.5, "waiting", "device of a")
    assert 20e6 < status.memory_peak_bytes < 200e6


# --- rounds over HTTP -------------------------------------------------------------------------------------------


def test_the_server_ends_when_all_clients_know_that_the_run_has_finished(tmp_path, start_server):
    server = start_server(make_run(tmp_path / "state"), exit_when_finished=True, finish_grace_s=0.3)
    clients = [Client(server.url, name) for name in "ab"]
    for each in clients:
        each.register()
    for server_round in (1, 2):
        manifest = clients[0].wait_for_round(server_round)
        updates = updates_for(manifest, "ab")
        for each in clients:
            assignment = each.assignment(wait_s=5)
            assert isinstance(assignment, Assignment)
            assert assignment.server_round == server_round
            each.send(updates[each.client_id])
    final = clients[0].wait_for_round(3)
    assert isinstance(clients[0].assignment(wait_s=5), Finished)
    assert [ledger.server_round for ledger in clients[0].status().history] == [1, 2]
    expected = {c: updates[c] for c in "ab"}
    assert len(clients[0].values(final, tmp_path))
    assert expected
    clients[1].request("POST", routes.LEAVE, content=encode_message(Leave(reason="done")))
    assert server.process.wait(10) == 0
    assert server.log.read_text().count("the server ends") == 1


def test_a_long_poll_returns_when_the_round_opens_or_its_time_is_over(tmp_path, start_server):
    server = start_server(make_run(tmp_path / "state"))
    first, second = Client(server.url, "a"), Client(server.url, "b")
    first.register()
    started = time.monotonic()
    assert isinstance(first.assignment(wait_s=0.5), Wait)
    assert time.monotonic() - started >= 0.45
    timer = threading.Timer(0.3, second.register)
    timer.start()
    started = time.monotonic()
    assert isinstance(first.assignment(wait_s=20), Assignment)
    assert time.monotonic() - started < 5
    timer.join()  # its answer may come after ours


def test_an_upload_resumes_after_a_cut_connection(tmp_path, start_server):
    server = start_server(make_run(tmp_path / "state", hidden=20_000))
    clients = {name: Client(server.url, name) for name in "ab"}
    for each in clients.values():
        each.register()
    update = updates_for(clients["a"].manifest(), "a")["a"]
    half = len(update.frame) // 2
    assert half > 4 * routes.CHUNK_BYTES
    port = int(server.url.rsplit(":", 1)[1])
    head = (
        f"PUT /v1/clients/a/rounds/1/uploads/1?offset=0 HTTP/1.1\r\nhost: x\r\ncontent-length: {len(update.frame)}\r\n"
        f"{routes.CLIENT_KEY_HEADER}: {toy_run.KEY}a\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(head.encode() + update.frame[:half])
        time.sleep(0.3)
    offset, status = clients["a"].offset(update.meta)
    assert 0 < offset <= half
    assert status == "partial"
    with pytest.raises(OffsetMismatch) as caught:
        clients["a"].put(update.meta, update.frame, offset=0)
    offset = caught.value.offset
    chunks = (update.frame[at : at + 100_000] for at in range(offset, len(update.frame), 100_000))
    assert clients["a"].put(update.meta, chunks, offset=offset) == len(update.frame)  # chunked encoding
    assert clients["a"].commit(update.meta) is False
    assert clients["a"].commit(update.meta) is True
    assert clients["a"].offset(update.meta) == (len(update.frame), "accepted")
    other = make_update(clients["a"].manifest(), "a", {}, attempt=2)
    with pytest.raises(UpdateConflict):
        clients["a"].put(other.meta, other.frame)


def test_refusals_of_uploads_over_http(tmp_path, start_server):
    server = start_server(make_run(tmp_path / "state"))
    first, second = Client(server.url, "a"), Client(server.url, "b")
    first.register()
    update = updates_for(first.manifest(), "a")["a"]
    with pytest.raises(RoundClosed, match="no part"):
        first.put(update.meta, update.frame)
    second.register()
    with pytest.raises(UpdateTooLarge):
        first.put(update.meta, b"x" * 1_000_000)
    with pytest.raises(UpdateTooLarge):  # without a length, found while it streams
        first.put(update.meta, (b"x" * 100_000 for _ in range(50)))
    with pytest.raises(NotFound):
        first.commit(update.meta)
    tensors = trained([unit for unit in first.manifest().units if unit.kind == "router"], 1)
    tensors["layer0.router|w"][1][1, 1] = np.inf
    bad = make_update(first.manifest(), "a", tensors)
    first.put(bad.meta, bad.frame)
    with pytest.raises(InvalidUpdate, match=r"layer0.router\|w"):
        first.commit(bad.meta)
    assert first.offset(bad.meta) == (0, "partial")
    assert first.send(update) is False


# --- the process ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_cleanly_during_a_poll_and_an_upload(tmp_path, start_server, how):
    server = start_server(make_run(tmp_path / "state"))
    for name in "abc":
        Client(server.url, name).register()
    update = updates_for(Client(server.url, "a").manifest(), "a")["a"]
    stop = threading.Event()

    def slow():
        yield update.frame[:100]
        stop.wait(20)

    def ignore(call, *args, **options):
        with contextlib.suppress(httpx.HTTPError, EdgefedError):
            call(*args, **options)

    threads = [
        threading.Thread(target=ignore, args=(Client(server.url, "c").assignment, 25)),
        threading.Thread(target=ignore, args=(Client(server.url, "a").put, update.meta, slow())),
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    os.kill(server.process.pid, how)
    assert server.process.wait(10) == 0
    assert time.monotonic() - started < 8
    stop.set()
    for thread in threads:
        thread.join(10)
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "Cancel" not in log  # uvicorn's words
    assert "clients repeat them" in log
    again = start_server(tmp_path / "state")
    assert Client(again.url, "a").offset(update.meta) == (100, "partial")


def test_a_busy_port_a_locked_folder_and_a_missing_token_are_refused(tmp_path, start_server):
    state = make_run(tmp_path / "state")
    server = start_server(state)
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(PortInUse, match=str(port)):
        bind("127.0.0.1", port)
    with pytest.raises(StateLocked):
        run_server(ServerConfig(state_folder=state, port=0), make_method=toy_run.make_method)
    for host in ("0.0.0.0", "::"):
        with pytest.raises(MissingToken):
            check_token(host, None)
        check_token(host, TOKEN)
    check_token("localhost", None)
    for token in ("ä" * 16, " " + TOKEN, TOKEN + "\nb", "a", "aaaaaaaaaaaaaaaa", "short-token"):
        with pytest.raises(ConfigError):
            check_token("127.0.0.1", token)
    with pytest.raises(NetworkError):
        bind("203.0.113.7", 0)
    with pytest.raises(NetworkError):
        bind("no such host", 0)
    with pytest.raises(ConfigError):
        bind("127.0.0.1", 70_000)


def test_an_error_of_the_method_stops_the_server_and_keeps_updates(tmp_path):
    state = make_run(tmp_path / "state")
    toy = toy_run.Toy(state)
    toy.join("a", "b")
    for name in "ab":
        toy.send(toy.update(name, 1))
    toy.close()

    class Broken(toy_run.Mean):
        def plan_merge(self, contributions, units):
            raise RuntimeError("an error in the method")

    with pytest.raises(RuntimeError, match="an error in the method"):
        run_server(ServerConfig(state_folder=state, port=0), make_method=lambda *_: Broken())
    again = toy_run.Toy(state)
    again.run.fold_pending()
    assert again.manifest().server_round == 2
    again.close()


def test_the_server_never_loads_a_model_library(tmp_path):
    code = (
        "import sys, pathlib, toy_run; from edgefed.aggregator.server import AggregatorServer, ServerConfig\n"
        "server = AggregatorServer(ServerConfig(pathlib.Path(sys.argv[1]), port=0), make_method=toy_run.make_method,\n"
        "    on_ready=lambda url: server.stop())\n"
        "server.run(); print([m for m in ('torch', 'transformers', 'httpx', 'edgefed.moe') if m in sys.modules])"
    )
    state = make_run(tmp_path / "state")
    done = subprocess.run(
        [sys.executable, "-c", code, str(state)], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )  # fmt: skip
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_a_policy_is_stored_and_read_back(tmp_path):
    policy = {"rounds": 4, "min_clients": 3, "quorum": 2, "deadline_s": 1.5, "clients_per_round": 3}
    toy = toy_run.Toy(make_run(tmp_path / "state", **policy))
    assert toy.run.policy == RoundPolicy(**policy)
    toy.close()
